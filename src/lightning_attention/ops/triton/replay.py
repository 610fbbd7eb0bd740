"""Calls made again: for arguments that look like earlier ones, the same launches with other addresses.

What a call does on the host, other than to make empty tensors and to launch, follows from the look of its arguments: it
is done once.
"""

from collections.abc import Callable, Iterable
from contextvars import ContextVar, copy_context
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class Launch(NamedTuple):
    """`run(*pointers, *rest)`; no run where the compiled code is not for all tensors of this look."""

    run: Callable[..., None] | None
    tensors: tuple[Tensor | None, ...]
    rest: tuple[float | int | str, ...]


_launches: ContextVar[list[Launch] | None] = ContextVar("launches", default=None)


def note(run: Callable[..., None] | None, tensors: tuple[Tensor | None, ...], *rest: float | int | str) -> None:
    """A launch, for the call that is being recorded, if one is."""
    if (launches := _launches.get()) is not None:
        launches.append(Launch(run, tensors, rest))


def record(function: Callable, *arguments: Any) -> tuple[Any, Callable | None]:
    """What `function(*arguments)` returns, a tensor or a tuple of tensors and None; and what does so for others alike.

    Alike are those with tensors of the same shapes, strides, dtypes, device and alignment, and all else equal. There is
    nothing for them, None, where the function does more than launch: where it copies an argument, or launches nothing.
    """
    launches: list[Launch] = []
    context = copy_context()
    context.run(_launches.set, launches)
    result = context.run(function, *arguments)
    return result, _replay(arguments, launches, result)


def _replay(arguments: tuple[Any, ...], launches: list[Launch], result: Any) -> Callable | None:
    positions = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
    results = (result,) if isinstance(result, Tensor) else result
    given = _by_pointer(arguments[i] for i in positions)
    launched = _by_pointer(x for launch in launches for x in launch.tensors)
    made = {pointer: x for pointer, x in (launched | _by_pointer(results)).items() if pointer not in given}
    if (
        launched.keys() != given.keys() | made.keys()
        or len(given) != len(positions)  # one tensor given twice
        or 0 in launched  # an empty one
        or not all(x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes() for x in made.values())
        or not all(launch.run for launch in launches)
    ):
        return None
    slots = {pointer: slot for slot, pointer in enumerate([*given, *made])}

    def slots_of(tensors: tuple[Tensor | None, ...]) -> list[int]:
        return [-1 if x is None else slots[x.data_ptr()] for x in tensors]

    device = arguments[positions[0]].device
    # To make strides of sizes takes PyTorch as long as all else that it does for an empty tensor.
    sizes = [(x.shape, x.stride(), x.dtype) for x in made.values()]
    runs = [(run, itemgetter(*slots_of(tensors)), rest) for run, tensors, rest in launches if run]
    returned, is_one = slots_of(results), isinstance(result, Tensor)

    def launch_all(pointers: list[int | None]) -> None:
        for run, pick, rest in runs:
            run(*pick(pointers), *rest)

    def replay(*arguments: Any) -> Any:
        tensors = [arguments[i] for i in positions]
        tensors += [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in sizes]
        pointers = [x.data_ptr() for x in tensors]
        with torch.accelerator.device_index(device.index):
            with_scratch(device, launch_all, [*pointers, None])
        tensors.append(None)
        return tensors[returned[0]] if is_one else tuple(tensors[slot] for slot in returned)

    return replay


def _by_pointer(tensors: Iterable[Tensor | None]) -> dict[int, Tensor]:
    return {x.data_ptr(): x for x in tensors if x is not None}


def with_scratch(device: torch.device, function: Callable, *arguments: Any, **options: Any) -> Any:
    """Calls it, with memory for what kernels keep outside of their tensors: descriptors of TMA.

    Kernels may overlap, so it is freed when all are launched. An allocator that the caller has set stays.
    """
    scratch: list[Tensor] = []

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        scratch.append(torch.empty(size, dtype=torch.int8, device=device))
        return scratch[-1]

    context = copy_context()
    context.run(triton.set_allocator, allocate)
    return context.run(function, *arguments, **options)
