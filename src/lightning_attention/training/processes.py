"""Processes of a run, started by torchrun: forming groups, agreeing on results and errors, sharding the model."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from threading import Thread
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..distributed.parallel import SequenceParallel
from ..models import LightningForCausalLM

T = TypeVar("T")

NO_ANSWER = "no answer within --timeout: "
LOST = (
    "another process of the run was lost; resume from the last checkpoint with --resume, "
    "or have torchrun do so with --max-restarts"
)
# Other processes wait for one that tokenizes, which may take days.
OBJECT_TIMEOUT = timedelta(days=30)


class SharedError(ValueError):
    """An error of one process, raised on all of them."""


def join_processes(timeout: float) -> None:
    """Form the default process group if torchrun has started this process.

    TrainingArguments would form it too, but without the timeout on a CPU.

    Args:
        timeout: seconds to wait for a process that does not answer.
    """
    PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(seconds=timeout))
    if dist.is_initialized():
        _watch(dist.group.WORLD)


def local_device() -> torch.device:
    """The device of this process."""
    return cast(torch.device, PartialState().device)


def leave_processes() -> None:
    """Destroy the process group, so that no process exits while another still communicates with it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_restarted() -> bool:
    """True if torchrun started this process in place of a lost one."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def together(action: Callable[[], T]) -> T:
    """Call `action` on every process and return its result.

    Raises:
        SharedError: the call failed on one of several processes; a single process raises the error itself.
    """
    if not dist.is_initialized():
        return action()
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    messages = _gather(None if error is None else _in_one_line(error))
    failed = [i for i, message in enumerate(messages) if message is not None]
    if failed:
        message = messages[failed[0]]
        is_everywhere = len(failed) == len(messages) and len(set(messages)) == 1
        raise SharedError(message if is_everywhere else f"process {failed[0]}: {message}") from error
    return cast(T, result)


def on_first(action: Callable[[], T]) -> T:
    """Call `action` on the first process while the others wait; return its result on all of them.

    Raises:
        SharedError: as `together`.
    """
    result = together(lambda: action() if rank() == 0 else None)
    return cast(T, _gather(result)[0] if dist.is_initialized() else result)


def check_equal(values: dict[str, Any]) -> None:
    """Check that all processes have equal values.

    Raises:
        SharedError: a value differs between processes.
    """
    given = _gather(values) if dist.is_initialized() else [values]
    for name in values:
        column = [process[name] for process in given]
        if any(value != column[0] for value in column):
            raise SharedError(f"{name} must be the same on every process, got {', '.join(map(repr, column))}")


def sum_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Add up each value over all processes, in float64."""
    if not dist.is_initialized():
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return totals.tolist()


def sequence_parallel_group(size: int, strategy: str, timeout: float) -> SequenceParallel | None:
    """Form groups of `size` processes that share sequences; return the group of this process, None for size 1.

    Ranks of a group are consecutive, so that its states stay on one machine where possible.

    Raises:
        ValueError: the number of processes is not a multiple of `size`.
    """
    if size == 1:
        return None
    if world_size() % size:
        raise ValueError(
            f"sequence_parallel must divide the number of processes, which torchrun sets: {world_size()}, got {size}"
        )
    group: Any = dist.new_subgroups(size, timeout=timedelta(seconds=timeout))[0]
    _watch(group)
    return SequenceParallel(group, strategy)


def shard(model: LightningForCausalLM, device_type: str) -> None:
    """Shard parameters, gradients and optimizer state over all processes: FSDP2, one layer at a time."""
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    modules: list[nn.Module] = [*model.model.layers, model]
    for module in modules:
        fully_shard(module, mesh=mesh)


@contextmanager
def explain_lost_processes() -> Iterator[None]:
    """Replace the errors that a lost process causes on the others by one that says so.

    Raises:
        ConnectionError: in place of the error that the process group's backend raises.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            is_late = "timed out" in str(error).lower()
            raise ConnectionError(f"{NO_ANSWER if is_late else ''}{LOST}") from error
        raise


@cache
def _watch(group: Any) -> None:
    """End this process, with a line, when another one does not answer in a collective of NCCL.

    The host does not wait for these collectives, so none raises; NCCL aborts the process, a minute later.
    """
    if dist.get_backend(group) == "nccl":
        backend = group._get_backend(torch.device("cuda"))
        Thread(target=_end_after_timeout, args=(backend,), daemon=True).start()


def _end_after_timeout(backend: Any, seconds: float = 1.0) -> None:
    while backend.get_error().name != "TIMEOUT":
        time.sleep(seconds)
    print(f"lightning-attention: {NO_ANSWER}{LOST}", file=sys.stderr, flush=True)
    os._exit(2)


def _gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_object_group(dist.group.WORLD))
    return values


@cache
def _object_group(world: Any) -> Any:
    """Group of all processes for objects on the host, with a long timeout."""
    return dist.new_group(backend="gloo", timeout=OBJECT_TIMEOUT)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
