"""Sequences of a batch: which tokens belong together, and how they are packed for the layers.

The layers know two forms: a full rectangle `[B, T]`, or packed sequences `[1, tokens]` with `cu_seqlens`. Padding is
left out before the layers, so it costs nothing and touches no state, wherever it stands in a batch row.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.problem import sequence_bounds
from .cache import LightningCache

SEVERAL = (
    "position_ids that restart, seq_idx or attention_mask describe several documents in a batch row, which a cache "
    "cannot hold: leave out the cache, or use_cache"
)


@dataclass(frozen=True)
class Layout:
    """`pack` brings `[B, T, ...]` into the form of the layers, `unpack` back.

    Attributes:
        batch_shape: `(B, T)`.
        positions: `[B or 1, T]`, or `[1, tokens]` when packed.
        cu_seqlens: `[N + 1]` when packed.
        tokens: indices into the flattened batch, where packing leaves padding out.
        has_documents: whether a batch row may hold more than one sequence.
        slots: `[B]`, where single tokens are decoded and some batch rows have none: the row's state, or -1.
    """

    batch_shape: tuple[int, int]
    positions: Tensor
    cu_seqlens: Tensor | None = None
    tokens: Tensor | None = None
    has_documents: bool = False
    slots: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        if self.cu_seqlens is None:
            return x
        x = x.flatten(0, 1)
        return (x if self.tokens is None else x[self.tokens])[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Zero in the padding."""
        if self.slots is not None:
            return x * (self.slots >= 0)[:, None, None]
        if self.cu_seqlens is None:
            return x
        x = x[0]
        if self.tokens is not None:
            batch_size, length = self.batch_shape
            x = x.new_zeros(batch_size * length, *x.shape[1:]).index_copy(0, self.tokens, x)
        return x.unflatten(0, self.batch_shape)

    def count_tokens(self) -> int | Tensor:
        """Tokens of every batch row, padding not counted; for a layout without documents."""
        if self.slots is not None:
            return (self.slots >= 0).long()
        return self.batch_shape[1] if self.cu_seqlens is None else self.cu_seqlens.diff()

    def before_sequences(self, states: Tensor) -> Tensor:
        """From the states before every batch row `[B, ...]` to those before every sequence `[N, ...]`, mostly zero."""
        if self.cu_seqlens is None:
            return states
        first = self._first_of_rows.to(states.device)
        return states.new_zeros(len(self.cu_seqlens) - 1, *states.shape[1:]).index_copy(0, first, states)

    def after_rows(self, states: Tensor) -> Tensor:
        """From the states after every sequence `[N, ...]` to those after every batch row `[B, ...]`."""
        if self.cu_seqlens is None:
            return states
        return states[self._first_of_rows.roll(-1) - 1]  # -1, the last one, for the last row

    @cached_property
    def _first_of_rows(self) -> Tensor:
        """`[B]`, which sequence every batch row begins with."""
        assert self.cu_seqlens is not None
        batch_size, length = self.batch_shape
        starts = torch.arange(batch_size, device=self.cu_seqlens.device) * length
        return torch.searchsorted(self.cu_seqlens, starts)


def layout_of(
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: LightningCache | None,
    *,
    keeps_state: bool,
) -> Layout:
    """The layout of inputs `x` `[B, T, W]` as `LightningModel.forward` takes them.

    A document starts with every batch row, and wherever one of the descriptions says so: `position_ids` that do not go
    on, another number in `seq_idx` or in the mask, a bound of `cu_seqlens`. While a graph is traced no value can be
    looked at: then inputs that may describe documents are packed as documents.

    Args:
        cache: what came before.
        keeps_state: whether a cache gets the state after every batch row, so that a row must be one sequence.

    Raises:
        ValueError: a shape or value does not fit, or a row holds several documents and `keeps_state`.
        TypeError: not a tensor, or the wrong dtype.
    """
    batch_size, length = x.shape[:2]
    keep, numbers = _parse_mask(attention_mask, batch_size, length, 0 if cache is None else cache.length)
    position_ids = _parse("position_ids", position_ids, batch_size, length)
    seq_idx = _parse("seq_idx", seq_idx, batch_size, length)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, batch_size, length)
        if keep is not None:
            raise ValueError("cu_seqlens goes with no padding: leave attention_mask out, or padding tokens")
        if keeps_state:
            raise ValueError("cu_seqlens goes with no cache: a cache holds one sequence of each batch row")
        if position_ids is seq_idx is numbers is None:
            return _of_packed(cu_seqlens, length)

    tokens = None if keep is None else keep.flatten().nonzero()[:, 0]
    documents = position_ids, seq_idx, numbers, cu_seqlens
    if length > 1 and any(x is not None for x in documents):
        index = torch.arange(batch_size * length, device=x.device) if tokens is None else tokens
        starts, row_starts = _starts(index, length, *documents)
        if _has_documents(starts, row_starts, keeps_state):
            return _of_documents(x, index, starts, position_ids, tokens)

    if position_ids is None:
        counted = torch.arange(length, device=x.device)[None] if keep is None else keep.cumsum(dim=1) - 1
        past = None if cache is None else cache.positions
        position_ids = counted if past is None else past[:, None] + counted
    if keep is None:
        return Layout((batch_size, length), position_ids)
    if keeps_state and length == 1 and not torch.is_grad_enabled():
        slots = torch.where(keep[:, 0], torch.arange(batch_size, device=x.device), -1)
        return Layout((batch_size, length), position_ids, slots=slots)
    assert tokens is not None
    cu_seqlens = F.pad(keep.sum(dim=1).cumsum(dim=0), (1, 0))
    positions = position_ids.expand_as(keep).flatten()[tokens][None]
    return Layout((batch_size, length), positions, cu_seqlens, tokens)


def _of_packed(cu_seqlens: Tensor, length: int) -> Layout:
    """The sequences of one batch row, without a look at values."""
    token = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    starts = cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]
    return Layout((1, length), (token - starts)[None], cu_seqlens, has_documents=True)


def _of_documents(
    x: Tensor, index: Tensor, starts: Tensor, position_ids: Tensor | None, tokens: Tensor | None
) -> Layout:
    first = starts.nonzero()[:, 0]
    count = torch.ones_like(index).sum()[None]  # the number of tokens, which no graph knows
    if position_ids is None:
        positions = torch.arange(index.shape[0], device=x.device) - first[starts.cumsum(dim=0) - 1]
    else:
        positions = position_ids.flatten()[index]
    return Layout((x.shape[0], x.shape[1]), positions[None], torch.cat([first, count]), tokens, has_documents=True)


def _starts(
    index: Tensor,
    length: int,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    numbers: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`[tokens]`: where documents start among the tokens at `index` of the flattened batch, and where rows do."""
    count = index.shape[0]

    def change(x: Tensor) -> Tensor:
        return x - F.pad(x, (1, 0)).narrow(0, 0, count)  # unlike diff() of any size, also while a graph is traced

    starts = row_starts = (torch.arange(count, device=index.device) == 0) | (change(index // length) != 0)
    for number in (seq_idx, numbers):
        if number is not None:
            starts = starts | (change(number.flatten()[index]) != 0)
    if position_ids is not None:
        step = change(position_ids.flatten()[index])
        # Positions go on by one, or by as many columns as there are between two tokens, where padding is counted.
        starts = starts | ((step != 1) & (step != change(index % length)))
    if cu_seqlens is not None:
        starts = starts | torch.isin(index, cu_seqlens)
    return starts, row_starts


def _has_documents(starts: Tensor, row_starts: Tensor, keeps_state: bool) -> bool:
    """Whether a batch row holds several documents, which is refused where a cache keeps its state."""
    several = (starts & ~row_starts).any()
    if torch.compiler.is_compiling():
        if keeps_state:
            torch._assert_async(~several, SEVERAL)  # pyright: ignore[reportPrivateImportUsage]
        return not keeps_state
    if keeps_state and bool(several):
        raise ValueError(SEVERAL)
    return bool(several)


def _parse_mask(
    mask: Tensor | None, batch_size: int, length: int, past_length: int
) -> tuple[Tensor | None, Tensor | None]:
    """The mask of these tokens: `[B, T]`, true for tokens, None where all are; and the numbers of their documents."""
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {type(mask).__name__}")
    if mask.dim() != 2 or mask.shape[0] != batch_size or mask.shape[1] not in (length, past_length + length):
        longer = f", or longer by the {past_length} columns in the cache" if past_length else ""
        raise ValueError(
            f"attention_mask must be [B, T] = [{batch_size}, {length}]{longer}, got shape {tuple(mask.shape)}"
        )
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"attention_mask must be bool, or integers that are 0 in the padding, got {mask.dtype}: masks that are "
            "added to scores are not understood"
        )
    mask = mask[:, mask.shape[1] - length :]
    if mask.dtype == torch.bool:
        return (mask if torch.compiler.is_compiling() or not bool(mask.all()) else None), None
    if torch.compiler.is_compiling():
        return mask != 0, mask
    low, high = torch.stack(mask.aminmax()).tolist() if mask.numel() else (1, 1)
    if low < 0:
        raise ValueError(f"attention_mask must be 0 in the padding and at least 1 elsewhere, got {low}")
    return (None if low else mask != 0), (mask if high > 1 else None)


def _parse(name: str, x: Tensor | None, batch_size: int, length: int) -> Tensor | None:
    """`[B, T]` integers."""
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
