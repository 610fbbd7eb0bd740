"""Exact training over segments, with the activations of one training segment in memory at a time.

Tokens depend on earlier tokens through the states of the layers alone. The forward pass reads a sequence segment by
segment and keeps the states before each one, and the activations of the last. The backward pass takes the segments in
reverse: it reads each but the last again, and passes the gradient of its states to the segment before. Memory for
activations is constant, memory for kept states is linear in the number of segments.
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
from ..models.mixers import check_is_linear
from ..ops.problem import state_dtype

# Arguments of a forward pass for its loss alone, whatever other results the configuration asks for.
FOR_LOSS = {"skip_logits": True, "use_cache": False, "output_hidden_states": False, "return_dict": True}


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
    """Compute the loss of `model(input_ids, labels=labels, position_ids=position_ids)` by training segments.

    Loss and gradients equal those of the model up to rounding. `backward()` of the loss reads every segment but the
    last once more and adds to the `grad` of the parameters; `torch.autograd.grad` is not supported. With gradients
    disabled only the loss is computed.

    With sequence parallelism (`LightningModel.set_sequence_parallel`) every process of the group gives the same
    sequences, the group shares every segment, and loss and gradients of a process are those of its own tokens, to be
    summed over the group.

    Args:
        model: a `LightningForCausalLM`, also with compiled layers (`compile_layers`), within `torch.compile` or
            `DistributedDataParallel`, or sharded by `fully_shard`.
        input_ids: `[B, T]`, any integer dtype, on any device; segments are moved to the model's device.
        labels: `[B, T]`, as for the model, by default `input_ids`; -100 is excluded from the loss.
        segment_length: tokens per training segment; the last one may be shorter.
        position_ids: `[B, T]`, by default counted from 0; a document starts at position 0, anywhere in a segment.
        num_items_in_batch: divisor of the summed loss, by default the number of labels; 0 counts as 1.
        truncate_every: cut the gradient of the states after every that many segments, which is not exact; by default
            it is not cut.
        offload_states: keep the states between segments in pinned host memory.

    Returns:
        Mean loss in nats per token, a scalar; 0, with zero gradients, if all labels are ignored.

    Raises:
        TypeError: the model is not a `LightningForCausalLM`, or is within DataParallel; tokens, labels or positions
            are not integers.
        ValueError: a shape or a length is out of range, or the model's attention is not computed from states.

    Example:
        >>> import torch
        >>> from lightning_attention.models import LightningConfig, LightningForCausalLM
        >>> from lightning_attention.training import segmented_loss
        >>> model = LightningForCausalLM(LightningConfig.from_size("demo", vocab_size=259))
        >>> segmented_loss(model, torch.randint(256, (1, 64)), segment_length=16).backward()
    """
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "segments do not go through DataParallel: use DistributedDataParallel, as train does in torchrun"
        )
    body = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(body, LightningForCausalLM):
        raise TypeError(
            "segments need a model whose tokens depend on each other through states alone: a LightningForCausalLM, "
            f"got {type(body).__name__}"
        )
    check_is_linear(body.config, "training segments")
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be [B, T] with T at least 1, got shape {tuple(input_ids.shape)}")
    for name, tensor in (("labels", labels), ("position_ids", position_ids)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"{name} must be [B, T] = {list(input_ids.shape)}, got shape {tuple(tensor.shape)}")
    for name, tensor in (("input_ids", input_ids), ("labels", labels), ("position_ids", position_ids)):
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
            raise TypeError(f"{name} must be integers, got {tensor.dtype}")
    for name, count in (("segment_length", segment_length), ("truncate_every", truncate_every)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    parallel = body.model.sequence_parallel
    if parallel is not None and len(input_ids) != 1:
        raise ValueError(f"with sequence parallelism input_ids must be one batch row, got {len(input_ids)}")
    segments = _Segments(input_ids, labels, position_ids, segment_length, body.device, parallel)
    count = segments.num_labels() if num_items_in_batch is None else num_items_in_batch
    passes = _Passes(model, body, segments, count, truncate_every, offload_states)
    if not torch.is_grad_enabled():
        return passes.forward()
    return _SegmentedLoss.apply(torch.zeros((), device=body.device, requires_grad=True), passes)


class _SegmentedLoss(torch.autograd.Function):
    """Connect both passes to autograd; the anchor is an input with a gradient, so that autograd calls `backward`."""

    @staticmethod
    def forward(ctx, anchor, passes):
        ctx.passes = passes
        return passes.forward(keep_states=True)

    @staticmethod
    def backward(ctx, *grad_outputs):
        ctx.passes.backward(*grad_outputs)
        return None, None


@dataclass(frozen=True)
class _Segments:
    """Batch that is read by training segments."""

    input_ids: Tensor
    labels: Tensor | None
    position_ids: Tensor | None
    segment_length: int
    device: torch.device
    parallel: SequenceParallel | None

    def __len__(self) -> int:
        return -(-self.input_ids.shape[1] // self.segment_length)

    def num_labels(self) -> int:
        """Count the labels that are not ignored, without the first of each batch row, which is never predicted."""
        return self.input_ids[:, 1:].numel() if self.labels is None else int((self.labels[:, 1:] != IGNORED).sum())

    def segment(self, index: int) -> dict[str, Tensor]:
        """Model inputs for a segment, or for this rank's slice of it, with shifted labels."""
        start, end = self._bounds(index)
        shared = {}
        if self.parallel is not None:
            shared = {"cu_seqlens": self._documents(start, end)}
            tokens = self.parallel.slice(end - start)
            start, end = start + tokens.start, start + tokens.stop
        labels = self._on_device((self.input_ids if self.labels is None else self.labels)[:, start + 1 : end + 1])
        labels = F.pad(labels, (0, end - start - labels.shape[1]), value=IGNORED)
        return {
            "input_ids": self._on_device(self.input_ids[:, start:end]),
            "position_ids": self._positions(start, end),
            "labels": labels,
            "shift_labels": labels,
        } | shared

    def _documents(self, start: int, end: int) -> Tensor:
        """`cu_seqlens` of the documents between two tokens, on the host."""
        starts = F.pad(self._positions(start, end)[0].diff() != 1, (1, 0), value=True).nonzero()[:, 0]
        return F.pad(starts, (0, 1), value=end - start).cpu()

    def continues(self, index: int) -> Tensor:
        """`[B, 1, 1, 1]`, True if the segment starts within a document that the segment before has begun."""
        start, _ = self._bounds(index)
        if start == 0:
            return torch.zeros(len(self.input_ids), 1, 1, 1, dtype=torch.bool, device=self.device)
        return (self._positions(start - 1, start + 1).diff(dim=1) == 1)[:, :, None, None]

    def _bounds(self, index: int) -> tuple[int, int]:
        start = index * self.segment_length
        return start, min(start + self.segment_length, self.input_ids.shape[1])

    def _positions(self, start: int, end: int) -> Tensor:
        if self.position_ids is None:
            return torch.arange(start, end, device=self.device).repeat(len(self.input_ids), 1)
        # Copied, since a compiled layer has a graph for each kind of view.
        return self._on_device(self.position_ids[:, start:end], copy=True)

    def _on_device(self, x: Tensor, copy: bool = False) -> Tensor:
        return x.to(self.device, torch.int64, non_blocking=True, copy=copy)


@dataclass(frozen=True)
class _Read:
    """A segment that was read for its gradients: its loss, the states before it, which are leaves, and after it."""

    loss: Tensor
    before: list[Tensor]
    after: list[Tensor]


class _Passes:
    """Forward and backward pass over the segments of a batch."""

    def __init__(
        self,
        model: nn.Module,
        body: LightningForCausalLM,
        segments: _Segments,
        num_items: int | Tensor,
        truncate_every: int | None,
        offload_states: bool,
    ):
        self.model, self.body, self.segments, self.num_items = model, body, segments, num_items
        self.device = segments.device
        self.truncate_every, self.offloads = truncate_every, offload_states and self.device.type != "cpu"
        self.kept: list[list[Tensor]] = []  # states before every segment
        self.last: _Read | None = None  # the last segment, between the passes
        self.autocast = _current_autocast(self.device.type)

    @torch.no_grad()
    def forward(self, *, keep_states: bool = False) -> Tensor:
        dtype = state_dtype(self.body.dtype)
        shapes = [(len(self.segments.input_ids), *shape) for shape in self.body.model.state_shapes]
        states = [torch.zeros(shape, dtype=dtype, device=self.device) for shape in shapes]
        loss = torch.zeros((), device=self.device)
        for index in range(len(self.segments)):
            continues = self.segments.continues(index)
            states = [state * continues for state in states]
            if keep_states:
                self.kept.append([self._offload(state) for state in states])
                if index == len(self.segments) - 1:
                    with self._sharing(index):
                        self.last = self._read_for_gradients(index)
                    return loss + self.last.loss
            segment_loss, states = self._read(index, states)
            states = self._sum_over_ranks(states)
            loss = loss + segment_loss
        return loss

    def backward(self, d_loss: Tensor) -> None:
        d_after: list[Tensor] | None = None
        for index in reversed(range(len(self.segments))):
            with self._sharing(index):
                read, self.last = self.last or self._read_for_gradients(index), None
                if d_after is None:
                    torch.autograd.backward(read.loss, d_loss)
                else:
                    torch.autograd.backward([read.loss, *read.after], [d_loss, *d_after])
            is_cut = self.truncate_every is not None and index % self.truncate_every == 0
            continues = self.segments.continues(index)
            d_after = None if is_cut else self._sum_over_ranks([_gradient(state) * continues for state in read.before])

    def _sharing(self, index: int) -> AbstractContextManager:
        """Processes exchange gradients once, with the first segment, whose gradient is the last."""
        return nullcontext() if index == 0 else _no_sync(self.model)

    @torch.enable_grad()
    def _read_for_gradients(self, index: int) -> _Read:
        kept = [state.to(self.device, non_blocking=True) for state in self.kept[index]]
        before = [state.detach().requires_grad_() for state in kept]
        loss, after = self._read(index, before)
        return _Read(loss, before, after)

    def _read(self, index: int, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Compute the loss of a segment and the states after it."""
        with self.autocast():
            outputs = self.model(
                **self.segments.segment(index), states=states, num_items_in_batch=self.num_items, **FOR_LOSS
            )
        return outputs.loss, list(outputs.states)

    def _sum_over_ranks(self, states: list[Tensor]) -> list[Tensor]:
        """Sum states, or their gradients, over the ranks that share the segments."""
        parallel = self.segments.parallel
        return states if parallel is None else parallel.sum([state.contiguous() for state in states])

    def _offload(self, state: Tensor) -> Tensor:
        if not self.offloads:
            return state
        host = torch.empty(state.shape, dtype=state.dtype, device="cpu", pin_memory=True)
        return host.copy_(state, non_blocking=True)


def _current_autocast(device_type: str) -> Callable[[], AbstractContextManager]:
    """The active autocast, for both passes; without its cache, which would keep weights cast without gradients."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


@contextmanager
def _no_sync(model: Any) -> Iterator[None]:
    """Do not exchange gradients between processes, with DistributedDataParallel or `fully_shard`."""
    model = getattr(model, "_orig_mod", model)  # unwrap torch.compile
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        with getattr(model, "no_sync", nullcontext)():
            yield
