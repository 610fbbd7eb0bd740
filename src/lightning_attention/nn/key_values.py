"""Keys and values of earlier tokens, which softmax attention keeps in place of a state."""

import torch
from torch import Tensor

from .sizes import check_integer, check_size

SLOTS = 256  # a buffer that grows without a window has a multiple of these


class KeyValues:
    """Keys and values of the earlier tokens of N sequences; with a window, of the first s and the last w alone.

    Token p of a sequence is in slot p; with a window, in `s + (p - s) mod w` from token s on, so that memory is
    constant. Padding is not kept.

    Args:
        num_sequences: N.
        num_heads: heads H of keys and values.
        head_dim: channels D of a head.
        window: w, the last tokens to keep of each sequence; None keeps all.
        sinks: s, first tokens to keep besides.
        dtype, device: of keys and values.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is out of range, or there are sinks without a window.

    Attributes:
        keys, values: `[N, S, H, D]` in S slots.
        lengths: `[N]` int64, tokens that each sequence has read.
        longest: an upper bound of the lengths, which the host knows.
        is_even: True while all lengths are `longest`.

    Example:
        >>> import torch
        >>> from lightning_attention.nn import KeyValues
        >>> past = KeyValues(2, 4, 16, window=None, dtype=torch.float32, device="cpu")
        >>> past.append(torch.randn(2, 10, 4, 16), torch.randn(2, 10, 4, 16))
        >>> past.lengths
        tensor([10, 10])
    """

    def __init__(
        self,
        num_sequences: int,
        num_heads: int,
        head_dim: int,
        *,
        window: int | None,
        sinks: int = 0,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        check_integer("num_sequences", num_sequences)
        for name, size in (("num_heads", num_heads), ("head_dim", head_dim)):
            check_size(name, size)
        check_window(window, sinks)
        shape = num_sequences, 0 if window is None else sinks + window, num_heads, head_dim
        self.window, self.sinks = window, sinks
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.lengths = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        self.longest, self.is_even = 0, True

    def append(self, k: Tensor, v: Tensor, counts: Tensor | None = None) -> None:
        """Append keys and values `[N, T, H, D]`, of each sequence the first `counts` `[N]`; by default all."""
        with torch.no_grad():  # as a decorator the compiler does not take it
            self._append(k, v, counts)

    def _append(self, k: Tensor, v: Tensor, counts: Tensor | None) -> None:
        length = k.shape[1]
        self.is_even = self.is_even and counts is None
        if self.window is None:
            self._reserve(self.longest + length)
        if self.is_even and (self.window is None or length == 1):
            start = self._slot(self.longest)
            self.keys[:, start : start + length], self.values[:, start : start + length] = k, v
        elif self.window is None or length == 1:
            # What is written beyond the counts is not read, and replaced by the next tokens; in a window it replaces a
            # token that the next one is too far from.
            slots = self.lengths[:, None] + torch.arange(length, device=k.device)
            if self.window is not None:
                slots = torch.where(slots < self.sinks, slots, self.sinks + (slots - self.sinks) % self.window)
            rows = torch.arange(len(slots), device=k.device)[:, None]
            self.keys[rows, slots], self.values[rows, slots] = k.to(self.keys.dtype), v.to(self.values.dtype)
        else:
            after = self.lengths + (length if counts is None else counts)
            new = self.positions(after) - self.lengths[:, None]
            is_new, index = (new >= 0)[:, :, None, None], new.clamp_min(0)[:, :, None, None]
            for kept, x in ((self.keys, k), (self.values, v)):
                kept.copy_(torch.where(is_new, x.to(kept.dtype).gather(1, index.expand_as(kept)), kept))
        self.lengths = self.lengths + (length if counts is None else counts)
        self.longest += length

    def positions(self, lengths: Tensor) -> Tensor:
        """`[N, S]` position of the token in each slot for sequences of these lengths; negative for none."""
        slots = torch.arange(self.keys.shape[1], device=self.keys.device)
        last = lengths[:, None] - 1
        first = torch.where(slots <= last, slots, -1)
        if self.window is None:
            return first
        latest = last - (last - slots) % self.window  # congruent to the slot
        return torch.where(slots < self.sinks, first, torch.where(latest < self.sinks, -1, latest))

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values in the slots that may hold a token, `[N, S, H, D]`."""
        slots = min(self.longest, self.keys.shape[1])
        return self.keys[:, :slots].to(dtype), self.values[:, :slots].to(dtype)

    def select(self, indices: Tensor) -> None:
        """Replace the sequences by those at `indices`, which may repeat."""
        indices = indices.to(self.keys.device)
        self.keys, self.values, self.lengths = (x[indices] for x in (self.keys, self.values, self.lengths))

    def reset(self) -> None:
        """Forget all tokens."""
        self.lengths, self.longest, self.is_even = torch.zeros_like(self.lengths), 0, True

    @property
    def nbytes(self) -> int:
        """Memory of keys and values, in bytes."""
        return self.keys.nbytes + self.values.nbytes

    def _slot(self, position: int) -> int:
        if self.window is None or position < self.sinks:
            return position
        return self.sinks + (position - self.sinks) % self.window

    def _reserve(self, length: int) -> None:
        """Make room for tokens; a larger buffer has a quarter more than is needed."""
        if length <= (size := self.keys.shape[1]):
            return
        more = -(-(length + size // 4) // SLOTS) * SLOTS - size
        for name in ("keys", "values"):
            kept = getattr(self, name)
            setattr(self, name, torch.cat([kept, kept.new_zeros(kept.shape[0], more, *kept.shape[2:])], dim=1))


def check_window(window: int | None, sinks: int) -> None:
    """Check how many of the last and of the first tokens to keep.

    Raises:
        TypeError: one is not an integer.
        ValueError: `window` is less than 1 or `sinks` less than 0, or there are sinks without a window.
    """
    if window is not None:
        check_size("window", window)
    check_integer("sinks", sinks)
    if sinks < 0:
        raise ValueError(f"sinks must be at least 0, got {sinks}")
    if sinks and window is None:
        raise ValueError("sinks go with a window of last tokens: give both")
