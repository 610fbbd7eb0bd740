"""Jobs of a rank in the training of a model with sequence parallelism."""

import warnings
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed.ranks import messages_by_way_of_the_host, over_nccl
from tiny_model import make_model, tokens
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_attention.distributed.parallel import SequenceParallel
from lightning_attention.models import compile_layers
from lightning_attention.training import segmented_loss


def positions(T: int, starts: list[int]) -> Tensor:
    """Positions `[1, T]` of packed sequences that start at 0 and at `starts`."""
    at = torch.arange(T)
    return (at - torch.tensor([0, *starts])[torch.searchsorted(torch.tensor(starts), at, right=True)])[None]


def gradients_of_one_process(T: int, starts: list[int], **options: Any) -> dict[str, Tensor]:
    model = make_model(**options)
    return _gradients(model, model(tokens(1, T), labels=tokens(1, T), position_ids=positions(T, starts)).loss)


def gradients_by_segments(
    group: Any, T: int, starts: list[int], segment_length: int, strategy: str, options: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """This rank's part of the gradients of `segmented_loss`, of a model with these options."""
    model = make_model(**options or {})
    model.model.set_sequence_parallel(SequenceParallel(group, strategy))
    position_ids = positions(T, starts)
    return _gradients(
        model, segmented_loss(model, tokens(1, T), position_ids=position_ids, segment_length=segment_length)
    )


def gradients_compiled(
    group: Any, kind: str, T: int, segment_length: int | None, is_compiled: bool
) -> tuple[dict[str, Tensor], int]:
    """Gradients of a model that the group shares in some way, perhaps with compiled layers; and the graph breaks."""
    rank, world = dist.get_rank(group), group or dist.group.WORLD
    model: Any = make_model(torch.float32)
    ids = tokens(1, T, seed=0 if kind == "tokens" else rank)
    if kind == "tokens":
        model.model.set_sequence_parallel(SequenceParallel(group))
    with warnings.catch_warnings(action="ignore"):  # from the compiler
        if is_compiled:
            torch.compiler.reset()
            counters.clear()
            compile_layers(model, "aot_eager")
        if kind == "model":
            mesh = DeviceMesh.from_group(cast(Any, world), "cpu")
            for module in (*model.model.layers, model):
                fully_shard(module, mesh=mesh)
        if kind == "sequences":
            model = DistributedDataParallel(model, process_group=world)
        if segment_length is None:
            loss = model(ids, labels=ids, cu_seqlens=torch.tensor([0, 7, T])).loss
        else:
            loss = segmented_loss(model, ids, segment_length=segment_length)
        gradients = _gradients(model, loss)
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in gradients.items()}
    return whole, sum(counters["graph_break"].values()) if is_compiled else 0


def gradients_of_last_labels(group: Any, T: int, num_labels: int, segment_length: int | None) -> dict[str, Tensor]:
    """This rank's part of the gradients of a loss over the last labels of a sequence."""
    model = make_model()
    if dist.is_initialized():
        model.model.set_sequence_parallel(SequenceParallel(group))
    ids, parallel = tokens(1, T), model.model.sequence_parallel
    labels = ids.masked_fill(torch.arange(T) < T - num_labels, -100)
    if segment_length is not None:
        return _gradients(model, segmented_loss(model, ids, labels, segment_length=segment_length))
    local = slice(T) if parallel is None else parallel.slice(T)
    inputs = {
        "input_ids": ids,
        "position_ids": positions(T, []),
        "shift_labels": F.pad(labels[:, 1:], (0, 1), value=-100),
    }
    given = {name: x[:, local] for name, x in inputs.items()}
    if parallel is not None:
        given["cu_seqlens"] = torch.tensor([0, T])
    return _gradients(model, model(**given, num_items_in_batch=num_labels).loss)


def gradients_of_one_process_on_a_gpu(T: int) -> dict[str, Tensor]:
    """Gradients of a float32 model."""
    model = make_model(torch.float32, hidden_size=96).cuda()
    return _gradients(model, model(tokens(1, T).cuda(), labels=tokens(1, T).cuda()).loss)


def gradients_on_a_gpu(group: Any, T: int, segment_length: int, strategy: str) -> dict[str, Tensor]:
    """This rank's part of the gradients, on one GPU for all ranks."""
    with messages_by_way_of_the_host():
        return _gradients_on_gpus(group, T, segment_length, strategy)


def gradients_over_nccl(group: Any, T: int, segment_length: int, strategy: str) -> dict[str, Tensor]:
    """This rank's part of the gradients, on a GPU of its own."""
    return _gradients_on_gpus(over_nccl(group), T, segment_length, strategy)


def _gradients_on_gpus(group: Any, T: int, segment_length: int, strategy: str) -> dict[str, Tensor]:
    model = make_model(torch.float32, hidden_size=96).cuda()
    model.model.set_sequence_parallel(SequenceParallel(group, strategy))
    loss = segmented_loss(model, tokens(1, T), segment_length=segment_length)
    return {name: x.cpu() for name, x in _gradients(model, loss).items()}


def gradients_averaged(ranks: int, T: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of one process for the batch rows of all ranks, of which each has as many labels."""
    model = make_model(torch.float32, **options)
    input_ids = torch.cat([tokens(1, T, seed=rank) for rank in range(ranks)])
    return _gradients(model, model(input_ids, labels=input_ids, skip_logits=True).loss)


def gradients_replicated(group: Any, T: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of a model within `DistributedDataParallel`, with one batch row per rank."""
    model = make_model(torch.float32, **options)
    input_ids = tokens(1, T, seed=dist.get_rank(group))
    replica = DistributedDataParallel(model, process_group=group)
    return _gradients(model, replica(input_ids, labels=input_ids, skip_logits=True).loss)


def gradients_sharded(
    group: Any, T: int, segment_length: int | None, options: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """Gradients of a model sharded over the group by `fully_shard`, with one batch row per rank."""
    model = make_model(torch.float32, **options or {})
    world: Any = group or dist.group.WORLD
    mesh = DeviceMesh.from_group(world, "cpu")
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    input_ids = tokens(1, T, seed=dist.get_rank(group))
    # The views are states, which are not changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if segment_length is None:
        loss = model(input_ids, labels=input_ids, skip_logits=True).loss
    else:
        loss = segmented_loss(model, input_ids, segment_length=segment_length)
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in _gradients(model, loss).items()}


def _gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {"loss": loss.detach()} | {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
