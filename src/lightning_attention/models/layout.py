"""Layout of a batch: where its sequences start, and how they are packed for the layers.

The layers take a full rectangle `[B, T]`, or packed sequences `[1, tokens]` with `cu_seqlens`. Padding, left, right or
inside a batch row, is removed before the layers, so it costs nothing and changes no state.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.values import sequence_bounds
from .cache import LightningCache, checksum

OTHER_PADDING = (
    "attention_mask marks other columns as padding than those that the cache has read: start with a new cache, or give "
    "the columns that the cache has read as they were"
)
UNKNOWN_NUMBERS = "attention_mask needs the columns in the cache too if it numbers sequences"
NEGATIVE_MASK = "attention_mask must be 0 in the padding and at least 1 elsewhere, got a negative number"
SEVERAL_SEQUENCES = (
    "position_ids that restart, seq_idx or attention_mask describe several sequences in a batch row, which a cache "
    "cannot hold: leave out the cache, or use_cache"
)


@dataclass(frozen=True)
class BatchDescription:
    """The arguments of `LightningModel.forward` that say where sequences start and where padding is."""

    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    seq_idx: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def may_split_rows(self) -> bool:
        """True if an argument other than the mask may start a sequence inside a batch row."""
        return not (self.position_ids is self.seq_idx is self.cu_seqlens is None)


@dataclass(frozen=True)
class Layout:
    """Form of a batch in the layers: `pack` brings `[B, T, ...]` into it, `unpack` back.

    Attributes:
        batch_shape: `(B, T)`.
        positions: `[B or 1, T]`, or `[1, tokens]` when packed.
        cu_seqlens: `[N + 1]` when packed.
        token_indices: `[tokens]` indices into the flattened batch, if packing removes padding.
        splits_rows: True if a batch row may hold more than one sequence.
        is_token: `[B, T]` bool, false in the padding; None without padding.
        slots: `[B]`, for decoding single tokens when some batch rows have none: index of the row's state, or -1.
    """

    batch_shape: tuple[int, int]
    positions: Tensor
    cu_seqlens: Tensor | None = None
    token_indices: Tensor | None = None
    splits_rows: bool = False
    is_token: Tensor | None = None
    slots: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` in the form of the layers."""
        if self.cu_seqlens is None:
            return x
        x = x.flatten(0, 1)
        return (x if self.token_indices is None else x[self.token_indices])[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Outputs of the layers as `[B, T, ...]`, zero in the padding."""
        if self.slots is not None:
            return x * (self.slots >= 0)[:, None, None]
        if self.cu_seqlens is None:
            return x
        x = x[0]
        if self.token_indices is not None:
            batch_size, length = self.batch_shape
            x = x.new_zeros(batch_size * length, *x.shape[1:]).index_copy(0, self.token_indices, x)
        return x.unflatten(0, self.batch_shape)

    def count_tokens(self) -> int | Tensor:
        """Number of tokens in each batch row without padding; for rows of one sequence each."""
        if self.slots is not None:
            return (self.slots >= 0).long()
        return self.batch_shape[1] if self.cu_seqlens is None else self.cu_seqlens.diff()

    def next_positions(self, past: Tensor | None) -> Tensor:
        """`[B]`, position after the last token of each batch row, `past` if it has none; for rows of one sequence."""
        batch_size, length = self.batch_shape
        before = self.positions.new_zeros(batch_size) if past is None else past
        if length == 0:
            return before
        if self.cu_seqlens is not None:
            after = F.pad(self.positions[0] + 1, (1, 0))[self.cu_seqlens[1:]]
        else:
            after = (self.positions[:, -1] + 1).expand(batch_size)
        return after if self.is_token is None else torch.where(self.is_token.any(dim=1), after, before)

    def before_sequences(self, states: Tensor) -> Tensor:
        """Spread states before batch rows `[B, ...]` to states before sequences `[N, ...]`, zero inside a row."""
        if self.cu_seqlens is None:
            return states
        first = self._first_sequences.to(states.device)
        return states.new_zeros(len(self.cu_seqlens) - 1, *states.shape[1:]).index_copy(0, first, states)

    def after_rows(self, states: Tensor) -> Tensor:
        """Select states after batch rows `[B, ...]` from states after sequences `[N, ...]`."""
        if self.cu_seqlens is None:
            return states
        return states[self._first_sequences.roll(-1) - 1]  # for the last row -1, the last sequence

    @cached_property
    def _first_sequences(self) -> Tensor:
        """`[B]`, index of the first sequence of each batch row."""
        assert self.cu_seqlens is not None
        batch_size, length = self.batch_shape
        starts = torch.arange(batch_size, device=self.cu_seqlens.device) * length
        return torch.searchsorted(self.cu_seqlens, starts)


def build_layout(x: Tensor, given: BatchDescription, cache: LightningCache | None, *, one_per_row: bool) -> Layout:
    """Build the layout of inputs `x` `[B, T, W]`.

    A sequence starts with every batch row, and wherever an argument says so: `position_ids` that do not continue,
    another number in `seq_idx` or in the mask, a bound of `cu_seqlens`. A traced graph cannot read values: inputs that
    may describe several sequences are then packed.

    Args:
        x: embeddings.
        given: the caller's arguments.
        cache: states and positions of earlier tokens.
        one_per_row: refuse batch rows of several sequences, because a cache keeps one state per batch row.

    Raises:
        ValueError: a shape or value does not fit, or a batch row holds several sequences and `one_per_row` is set, or
            goes on from another one in the cache.
        TypeError: an argument is not a tensor, or has the wrong dtype.
    """
    batch_size, length = x.shape[:2]
    is_token, numbers = _parse_mask(given.attention_mask, batch_size, length, cache)
    position_ids = _parse_integers("position_ids", given.position_ids, batch_size, length)
    seq_idx = _parse_integers("seq_idx", given.seq_idx, batch_size, length)
    if cache is not None and cache.positions is not None:
        _check_continues(cache, cache.positions, position_ids, seq_idx, is_token)
    if given.cu_seqlens is not None:
        _check_cu_seqlens(given.cu_seqlens, batch_size, length)
        if is_token is not None:
            raise ValueError("cu_seqlens goes with no padding: leave attention_mask out, or padding tokens")
        if one_per_row:
            raise ValueError("cu_seqlens goes with no cache: a cache holds one sequence of each batch row")
        if position_ids is seq_idx is numbers is None:
            return _layout_from_cu_seqlens(given.cu_seqlens, length)

    tokens = None if is_token is None else is_token.flatten().nonzero()[:, 0]
    if length > 1 and (given.may_split_rows or numbers is not None):
        index = torch.arange(batch_size * length, device=x.device) if tokens is None else tokens
        row_starts = _changes(index // length) != 0
        starts = _sequence_starts(index, length, position_ids, (seq_idx, numbers), given.cu_seqlens) | row_starts
        if _splits_rows(starts & ~row_starts, one_per_row):
            cu_seqlens, positions = _pack_sequences(index, starts, position_ids)
            return Layout((batch_size, length), positions, cu_seqlens, tokens, splits_rows=True, is_token=is_token)

    if position_ids is None:
        columns = torch.arange(length, device=x.device)[None]
        if is_token is not None:
            columns = (is_token.cumsum(dim=1) - 1).clamp_min(0)
        past = None if cache is None else cache.positions
        position_ids = columns if past is None else past[:, None] + columns
    if is_token is None:
        return Layout((batch_size, length), position_ids)
    if one_per_row and length == 1 and not torch.is_grad_enabled():
        slots = torch.where(is_token[:, 0], torch.arange(batch_size, device=x.device), -1)
        return Layout((batch_size, length), position_ids, is_token=is_token, slots=slots)
    assert tokens is not None
    cu_seqlens = F.pad(is_token.sum(dim=1).cumsum(dim=0), (1, 0))
    positions = position_ids.expand_as(is_token).flatten()[tokens][None]
    return Layout((batch_size, length), positions, cu_seqlens, tokens, is_token=is_token)


def _layout_from_cu_seqlens(cu_seqlens: Tensor, length: int) -> Layout:
    """Layout of one batch row of packed sequences, without reading values on the host."""
    token = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    starts = cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]
    return Layout((1, length), (token - starts)[None], cu_seqlens, splits_rows=True)


def _pack_sequences(index: Tensor, starts: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """`cu_seqlens` `[N + 1]` and positions `[1, tokens]` of sequences that begin where `starts` is true."""
    first = starts.nonzero()[:, 0]
    count = torch.ones_like(index).sum()[None]  # the number of tokens, unknown while a graph is traced
    if position_ids is None:
        positions = torch.arange(index.shape[0], device=index.device) - first[starts.cumsum(dim=0) - 1]
    else:
        positions = position_ids.flatten()[index]
    return torch.cat([first, count]), positions[None]


def _changes(x: Tensor) -> Tensor:
    """Difference of every element from the one before; for the first, from -1."""
    return x - F.pad(x, (1, 0), value=-1).narrow(0, 0, x.shape[0])  # unlike diff(), also traceable for any size


def _sequence_starts(
    index: Tensor,
    length: int,
    position_ids: Tensor | None,
    numbers: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
) -> Tensor:
    """`[tokens]` bool: true where a sequence starts among the tokens at `index` of the flattened batch."""
    starts = torch.zeros_like(index, dtype=torch.bool)
    for number in numbers:
        if number is not None:
            starts = starts | (_changes(number.flatten()[index]) != 0)
    if position_ids is not None:
        step = _changes(position_ids.flatten()[index])
        # Positions continue by 1, or by the columns between two tokens if padding is counted.
        starts = starts | ((step != 1) & (step != _changes(index % length)))
    if cu_seqlens is not None:
        starts = starts | torch.isin(index, cu_seqlens)
    return starts


def _splits_rows(starts_inside: Tensor, one_per_row: bool) -> bool:
    """True if a sequence may start inside a batch row, which is an error if each row must be one sequence."""
    if one_per_row:
        _refuse({SEVERAL_SEQUENCES: starts_inside})
        return False
    return torch.compiler.is_compiling() or bool(starts_inside.any())


def _refuse(reasons: dict[str, Tensor]) -> None:
    """Raise ValueError with the first reason that holds somewhere; in a traced graph when it runs."""
    found = {reason: wrong.any() for reason, wrong in reasons.items()}
    if torch.compiler.is_compiling():
        for reason, wrong in found.items():
            torch._assert_async(~wrong, reason)  # pyright: ignore[reportPrivateImportUsage]
        return
    for reason, wrong in zip(found, torch.stack(list(found.values())).tolist(), strict=True):  # the host waits once
        if wrong:
            raise ValueError(reason)


def _check_continues(
    cache: LightningCache,
    past: Tensor,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    is_token: Tensor | None,
) -> None:
    """Refuse first tokens of batch rows that do not go on from the cache, whose next positions are `past` `[B]`.

    They may go on by the number of columns between the tokens, if padding is counted.
    """
    if seq_idx is not None:
        raise ValueError("seq_idx goes with no earlier tokens in the cache, which does not hold it")
    if position_ids is None or not position_ids.numel() or (position_ids.shape[1] == 1 and not position_ids.is_cpu):
        return  # decoding on an accelerator does not wait for values, and can be captured in a CUDA graph
    column = torch.zeros_like(past) if is_token is None else is_token.int().argmax(dim=1)
    step = position_ids.gather(1, column[:, None])[:, 0] - past
    wrong = (step < 0) | (step > column + (0 if cache.padding is None else cache.padding[:, 0]))
    _refuse({SEVERAL_SEQUENCES: wrong if is_token is None else wrong & is_token.any(dim=1)})


def _check_past_mask(mask: Tensor, length: int, cache: LightningCache | None) -> None:
    """Refuse a mask whose columns before the last `length` are not those that the cache has read."""
    if cache is None or cache.positions is None:
        return
    past, reasons = mask[:, : mask.shape[1] - length], {}
    if past.shape[1]:
        padding = past == 0
        reasons[OTHER_PADDING] = padding if cache.padding is None else checksum(padding) != cache.padding
    if mask.dtype != torch.bool:
        numbers = mask.long()
        if not past.shape[1]:
            reasons[UNKNOWN_NUMBERS] = numbers > 1
        reasons[SEVERAL_SEQUENCES] = numbers.masked_fill(numbers == 0, 2**62).amin(dim=1) < numbers.amax(dim=1)
    if reasons:
        _refuse(reasons)


def _parse_mask(
    mask: Tensor | None, batch_size: int, length: int, cache: LightningCache | None
) -> tuple[Tensor | None, Tensor | None]:
    """Split a mask into `[B, T]` bool, true for tokens (None if all are), and `[B, T]` sequence numbers or None."""
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {type(mask).__name__}")
    past_length = 0 if cache is None else cache.length
    if mask.dim() != 2 or mask.shape[0] != batch_size or mask.shape[1] not in (length, past_length + length):
        longer = f", or longer by the {past_length} columns in the cache" if past_length else ""
        raise ValueError(
            f"attention_mask must be [B, T] = [{batch_size}, {length}]{longer}, got shape {tuple(mask.shape)}"
        )
    if mask.is_floating_point() and not torch.compiler.is_compiling() and _holds_zeros_and_ones(mask):
        mask = mask.bool()
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"attention_mask must be bool, or integers that are 0 in the padding, got {mask.dtype}: masks that are "
            "added to scores are not supported"
        )
    _check_past_mask(mask, length, cache)
    mask = mask[:, mask.shape[1] - length :]
    if mask.dtype == torch.bool:
        return (mask if torch.compiler.is_compiling() or not bool(mask.all()) else None), None
    if torch.compiler.is_compiling():
        _refuse({NEGATIVE_MASK: mask < 0})
        return mask != 0, mask.long()
    low, high = torch.stack(mask.aminmax()).tolist() if mask.numel() else (1, 1)
    if low < 0:
        raise ValueError(NEGATIVE_MASK)
    return (None if low else mask != 0), (mask.long() if high > 1 else None)


def _holds_zeros_and_ones(mask: Tensor) -> bool:
    """True if a float mask has ones, as PEFT's for virtual tokens; a mask that is added to scores has none."""
    is_one = mask == 1
    return bool(is_one.any() & (is_one | (mask == 0)).all())


def _parse_integers(name: str, x: Tensor | None, batch_size: int, length: int) -> Tensor | None:
    """Check `[B, T]` or `[1, T]` integers, and return them as `[B, T]` int64."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 2 or x.shape[0] not in (1, batch_size) or x.shape[1] != length:
        raise ValueError(f"{name} must be [B, T] = [{batch_size}, {length}], got shape {tuple(x.shape)}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {x.dtype}")
    return x.long().expand(batch_size, -1)


def _check_cu_seqlens(cu_seqlens: Tensor, batch_size: int, length: int) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be [N + 1], got shape {tuple(cu_seqlens.shape)}")
    if batch_size != 1:
        raise ValueError(f"cu_seqlens goes with one batch row (B = 1), got {batch_size}")
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        sequence_bounds(cu_seqlens, length)
