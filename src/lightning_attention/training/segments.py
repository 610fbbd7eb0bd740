"""Exact training over segments: memory of one segment, however long the sequence.

Only states pass from one token to the next, so a sequence is read segment by segment without keeping activations, but
for the state of every layer where a segment begins. The backward pass goes through the segments in reverse: each is
read again, and gives the one before it the gradient of its states.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..distributed.parallel import SequenceParallel
from ..models import LightningForCausalLM
from ..models.heads import IGNORED
from ..ops.problem import state_dtype


def segmented_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    segment_length: int,
    position_ids: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    truncate_every: int | None = None,
    offload_states: bool = False,
) -> Tensor:
    """The loss of `model(input_ids, labels=labels, position_ids=position_ids)` in the memory of one segment.

    It and its gradients are those of the whole, to rounding. `backward()` of the loss adds to the `grad` of the
    parameters, and reads every segment once more; `torch.autograd.grad` does not see them. Where gradients are
    disabled the loss alone is computed.

    Where the processes of a group share rows (`LightningModel.set_sequence_parallel`) each gives the whole row, they
    share every segment of it, and loss and gradients are those of a process's own tokens: parts of a sum.

    Args:
        model: a `LightningForCausalLM`, or one within `DistributedDataParallel` or `torch.compile`,
            or sharded by `fully_shard`.
        input_ids: `[B, T]` integers, on any device and of any integer dtype: a segment at a time goes to the model's.
        labels: `[B, T]`, as for the model, by default `input_ids`; -100 is left out of the loss.
        segment_length: tokens of a row in a segment; the last one may be shorter.
        position_ids: `[B, T]`, by default from 0; a document starts where they are 0, within a segment or not.
        num_items_in_batch: divide the sum of losses by it, instead of by the number of labels; 0 counts as 1.
        truncate_every: cut the gradient at the end of every so many segments. Not exact: what a token does to later
            parts is left out. By default it is not cut.
        offload_states: keep the states between segments in the memory of the host, pinned.

    Returns:
        The mean loss in nats a token, a scalar. Where all labels are ignored, the loss and its gradients are 0.

    Raises:
        TypeError: the tokens of the model may reach each other otherwise than through states, or it is in DataParallel.
        ValueError: a shape or a length is out of range.
    """
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "segments do not go through DataParallel: use DistributedDataParallel, as train does in torchrun"
        )
    body = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(body, LightningForCausalLM):
        raise TypeError(
            "segments need a model in which nothing but states goes from token to token: a LightningForCausalLM, "
            f"got {type(body).__name__}"
        )
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be [B, T] with T at least 1, got shape {tuple(input_ids.shape)}")
    for name, tensor in (("labels", labels), ("position_ids", position_ids)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"{name} must be [B, T] = {list(input_ids.shape)}, got shape {tuple(tensor.shape)}")
    for name, count in (("segment_length", segment_length), ("truncate_every", truncate_every)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    parallel = body.model.sequence_parallel
    if parallel is not None and len(input_ids) != 1:
        raise ValueError(f"with sequence parallelism input_ids must be one row, got {len(input_ids)}")
    row = _Row(input_ids, labels, position_ids, segment_length, body.device, parallel)
    count = row.num_labels() if num_items_in_batch is None else num_items_in_batch
    sweep = _Sweep(model, body, row, count, truncate_every, offload_states)
    if not torch.is_grad_enabled():
        return sweep.forward()
    return _SegmentedLoss.apply(torch.zeros((), device=body.device, requires_grad=True), sweep)


class _SegmentedLoss(torch.autograd.Function):
    """Loss and backward pass of a sweep. The anchor only makes PyTorch ask for it."""

    @staticmethod
    def forward(ctx, anchor, sweep):
        ctx.sweep = sweep
        return sweep.forward(states_are_kept=True)

    @staticmethod
    def backward(ctx, d_loss):
        ctx.sweep.backward(d_loss)
        return None, None


@dataclass(frozen=True)
class _Row:
    """The segments of a batch."""

    input_ids: Tensor
    labels: Tensor | None
    position_ids: Tensor | None
    segment_length: int
    device: torch.device
    parallel: SequenceParallel | None

    def __len__(self) -> int:
        return -(-self.input_ids.shape[1] // self.segment_length)

    def num_labels(self) -> int:
        """Labels that are not ignored. The first one of a batch row is predicted by no token."""
        return self.input_ids[:, 1:].numel() if self.labels is None else int((self.labels[:, 1:] != IGNORED).sum())

    def segment(self, index: int) -> dict[str, Tensor]:
        """Inputs of the model, with the token to predict for every token: of this rank, if a segment is shared."""
        start, end = self._bounds(index)
        shared = {}
        if self.parallel is not None:
            shared = {"cu_seqlens": self._documents(start, end)}
            held = self.parallel.slice(end - start)
            start, end = start + held.start, start + held.stop
        following = self._on_device((self.input_ids if self.labels is None else self.labels)[:, start + 1 : end + 1])
        following = F.pad(following, (0, end - start - following.shape[1]), value=IGNORED)
        return {
            "input_ids": self._on_device(self.input_ids[:, start:end]),
            "position_ids": self._positions(start, end),
            "labels": following,
            "shift_labels": following,
        } | shared

    def _documents(self, start: int, end: int) -> Tensor:
        """`cu_seqlens` of the tokens between, on the host."""
        starts = F.pad(self._positions(start, end)[0].diff() != 1, (1, 0), value=True).nonzero()[:, 0]
        return F.pad(starts, (0, 1), value=end - start).cpu()

    def goes_on(self, index: int) -> Tensor:
        """`[B, 1, 1, 1]`, whether the first token of the segment belongs to the document before it."""
        start, _ = self._bounds(index)
        if start == 0:
            return torch.zeros(len(self.input_ids), 1, 1, 1, dtype=torch.bool, device=self.device)
        return (self._positions(start - 1, start + 1).diff(dim=1) == 1)[:, :, None, None]

    def _bounds(self, index: int) -> tuple[int, int]:
        start = index * self.segment_length
        return start, min(start + self.segment_length, self.input_ids.shape[1])

    def _positions(self, start: int, end: int) -> Tensor:
        if self.position_ids is None:
            return torch.arange(start, end, device=self.device).expand(len(self.input_ids), -1)
        return self._on_device(self.position_ids[:, start:end])

    def _on_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, torch.int64, non_blocking=True)


class _Sweep:
    """Through the segments and back."""

    def __init__(
        self,
        model: nn.Module,
        body: LightningForCausalLM,
        row: _Row,
        num_items: int | Tensor,
        truncate_every: int | None,
        offload_states: bool,
    ):
        self.model, self.body, self.row, self.num_items = model, body, row, num_items
        self.truncate_every, self.is_offloaded = truncate_every, offload_states and row.device.type != "cpu"
        self.kept: list[list[Tensor]] = []
        self.autocast = _ambient_autocast(row.device.type)

    @torch.no_grad()
    def forward(self, *, states_are_kept: bool = False) -> Tensor:
        config, dtype = self.body.config, state_dtype(self.body.dtype)
        shapes = [(len(self.row.input_ids), *config.layer_state_shape(i)) for i in range(config.num_hidden_layers)]
        states = [torch.zeros(shape, dtype=dtype, device=self.row.device) for shape in shapes]
        loss = torch.zeros((), device=self.row.device)
        for index in range(len(self.row)):
            goes_on = self.row.goes_on(index)
            states = [state * goes_on for state in states]
            if states_are_kept:
                self.kept.append([self._put_away(state) for state in states])
            segment_loss, states = self._read(index, states)
            states = self._of_all_ranks(states)
            loss = loss + segment_loss
        return loss

    @torch.enable_grad()
    def backward(self, d_loss: Tensor) -> None:
        d_after: list[Tensor] | None = None
        for index in reversed(range(len(self.row))):
            kept = [state.to(self.row.device, non_blocking=True) for state in self.kept[index]]
            states = [state.detach().requires_grad_() for state in kept]
            # What the processes of a group have to exchange, they do once.
            with nullcontext() if index == 0 else _no_sync(self.model):
                loss, after = self._read(index, states)
                if d_after is None:
                    torch.autograd.backward(loss, d_loss)
                else:
                    torch.autograd.backward([loss, *after], [d_loss, *d_after])
            is_cut = self.truncate_every is not None and index % self.truncate_every == 0
            goes_on = self.row.goes_on(index)
            d_after = None if is_cut else self._of_all_ranks([_gradient(state) * goes_on for state in states])

    def _read(self, index: int, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The part of the loss that is this segment's, and the states after it."""
        with self.autocast():
            outputs = self.model(
                **self.row.segment(index), states=states, use_cache=False, num_items_in_batch=self.num_items
            )
        return outputs.loss, list(outputs.states)

    def _of_all_ranks(self, states: list[Tensor]) -> list[Tensor]:
        """Of states that one rank has, and zeros on the others."""
        return states if self.row.parallel is None else self.row.parallel.sum([state.contiguous() for state in states])

    def _put_away(self, state: Tensor) -> Tensor:
        """Where states wait for the backward pass."""
        if not self.is_offloaded:
            return state
        host = torch.empty(state.shape, dtype=state.dtype, device="cpu", pin_memory=True)
        return host.copy_(state, non_blocking=True)


def _ambient_autocast(device_type: str) -> Callable[[], AbstractContextManager]:
    """What the call is under, for the backward pass too. Weights cast without gradients must not be kept for it."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


@contextmanager
def _no_sync(model: Any) -> Iterator[None]:
    """Gradients stay on their process: of DistributedDataParallel, or of what `fully_shard` has changed."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        with getattr(model, "no_sync", nullcontext)():
            yield
