"""The processes of a run: what they agree on, and what they see of one that is gone."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState

T = TypeVar("T")

LOST = (
    "another process of the run was lost; go on from the last checkpoint with --resume, "
    "or have torchrun do so with --max-restarts"
)
# Tokenization by one process, for which the others wait, may take days.
LONG = timedelta(days=30)


class SharedError(ValueError):
    """What is wrong on one process, raised on all of them."""


def join_processes(timeout: float) -> None:
    """Form the group of the processes that torchrun has started, if it has.

    TrainingArguments would do it, but on a CPU without the timeout.

    Args:
        timeout: seconds that they wait for one of them that does not answer.
    """
    PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(seconds=timeout))


def leave_processes() -> None:
    """Leave the group in order, so that no process ends while another is still talking to it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_restarted() -> bool:
    """Whether torchrun has started this process in place of one that was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def together(action: Callable[[], T]) -> T:
    """Do it on every process.

    Raises:
        SharedError: it has failed on a process, if there are several; a single one raises the error itself.
    """
    if not dist.is_initialized():
        return action()
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    messages = _gather(None if error is None else _words(error))
    failed = [i for i, message in enumerate(messages) if message is not None]
    if failed:
        message = messages[failed[0]]
        is_everywhere = len(failed) == len(messages) and len(set(messages)) == 1
        raise SharedError(message if is_everywhere else f"process {failed[0]}: {message}") from error
    return cast(T, result)


def on_first(action: Callable[[], T]) -> T:
    """Let the first process do it while the others wait; return its result on all of them.

    Raises:
        SharedError: as `together`.
    """
    result = together(lambda: action() if rank() == 0 else None)
    return cast(T, _gather(result)[0] if dist.is_initialized() else result)


def check_equal(values: dict[str, Any]) -> None:
    """
    Raises:
        SharedError: the processes give other values for a name.
    """
    given = _gather(values) if dist.is_initialized() else [values]
    for name in values:
        column = [process[name] for process in given]
        if any(value != column[0] for value in column):
            raise SharedError(f"{name} must be the same on every process, got {', '.join(map(repr, column))}")


@contextmanager
def explaining_lost_processes() -> Iterator[None]:
    """Put into words what the others see of a process that is gone.

    Raises:
        ConnectionError: instead of whatever the backend of the process group raises.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            is_late = "timed out" in str(error).lower()
            reason = "no answer within --timeout: " if is_late else ""
            raise ConnectionError(f"{reason}{LOST}") from error
        raise


def _gather(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_patient_group(dist.group.WORLD))
    return values


@cache
def _patient_group(world: Any) -> Any:
    """A group of all processes for objects on the host, which waits for long."""
    return dist.new_group(backend="gloo", timeout=LONG)


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
