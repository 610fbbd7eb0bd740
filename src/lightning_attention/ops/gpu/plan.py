"""Plans: the launches of a call, prepared once for inputs of given metadata.

A backend describes a call to a `Planner`, by a pure function of the shapes, strides and dtypes of its inputs and of
options. The `Plan` that comes out is kept with all else that `calls.call` prepares. Every call allocates and launches.
"""

from collections.abc import Callable, Iterable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass
from functools import cache, partial, reduce
from itertools import accumulate, repeat
from operator import itemgetter, mul, or_
from typing import Any, NamedTuple, overload

import torch
import triton
from torch import Tensor

from .. import calls
from ..calls import Inputs, Prepared
from . import product_precision


class Operand(NamedTuple):
    """A tensor of a plan: input number `index`, or a contiguous buffer after the inputs."""

    index: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def token_strides(self) -> tuple[int, int, int]:
        """Strides of batch, token and head of `[B, T, H, D]`, or of `[B, H, D]`, which has one token."""
        batch, *token, head, _ = self.strides
        return batch, token[0] if token else 0, head


CONSTANT, SPECIALIZED, NOT_SPECIALIZED = "constant", "specialized", "not specialized"


class _Signature:
    """The parameters of a kernel, in order.

    Attributes:
        kernel: kept, since its id is a key.
        kinds: what compiled code depends on, by parameter: its value, properties of the value, or nothing.
        num_pointers: of parameters that are tensors, which come first; known after the first launch.
    """

    num_pointers = 0

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self._names, self._pick = frozenset(kernel.arg_names), itemgetter(*kernel.arg_names)
        self.kinds = [CONSTANT] * len(self._names)
        if hasattr(kernel, "params"):  # not under the interpreter
            self.kinds = [
                CONSTANT if param.is_constexpr else NOT_SPECIALIZED if param.do_not_specialize else SPECIALIZED
                for param in kernel.params
            ]

    def in_order(self, arguments: dict[str, Any]) -> tuple:
        if arguments.keys() != self._names:
            wrong = ", ".join(sorted(arguments.keys() ^ self._names))
            raise TypeError(f"{self.kernel.__name__} and its launch differ in arguments: {wrong}")
        values = self._pick(arguments)
        if not self.num_pointers:
            self.num_pointers = next(i for i, x in enumerate(values) if x is not None and not isinstance(x, Operand))
        return values


_signatures: dict[int, _Signature] = {}  # by id: Triton hashes a kernel's code


class Launch:
    """One launch of a kernel over a one-dimensional grid.

    Triton inspects all arguments at every launch, in 15 µs. Code that is compiled for aligned addresses is kept and
    launched directly from then on: all else that it depends on is fixed by the plan.
    """

    def __init__(self, kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, Any]):
        signature = _signatures.get(id(kernel)) or _signatures.setdefault(id(kernel), _Signature(kernel))
        values = signature.in_order(arguments)
        num_pointers = signature.num_pointers
        pointers, self._rest = values[:num_pointers], values[num_pointers:]
        self.kernel, self.grid, self.options = kernel, (programs, 1, 1), options
        # An index of -1 finds None, which `Plan.run` puts last.
        self._pick: Callable[[list], tuple] = itemgetter(*[-1 if x is None else x.index for x in pointers])
        self._dtypes = tuple([None if x is None else x.dtype for x in pointers])
        self._kinds = signature.kinds[num_pointers:]
        self._run: Callable[..., None] | None = None

    def __call__(self, memory: list[Tensor | None], addresses: list[int | None], is_aligned: bool) -> None:
        run = (self._run or self._find(memory)) if is_aligned else None
        if run is not None:
            run(*self._pick(addresses), *self._rest)
            return
        compiled = self.kernel[self.grid](*self._pick(memory), *self._rest, **self.options)
        if is_aligned and compiled is not None:  # the interpreter compiles nothing
            _compiled[self._key(memory)] = compiled

    def _find(self, memory: list[Tensor | None]) -> Callable[..., None] | None:
        """Code that a launch of this plan, or of another one, has compiled."""
        if (compiled := _compiled.get(self._key(memory))) is not None:
            self._run = compiled[self.grid]
        return self._run

    def _key(self, memory: list[Tensor | None]) -> tuple:
        """All that code compiled for aligned addresses depends on: of a number, what Triton specializes code on."""
        numbers = [
            value
            if kind is CONSTANT or value is None
            else kind is SPECIALIZED and (value == 1, value % 16 == 0, value >= 1 << 31)
            for kind, value in zip(self._kinds, self._rest, strict=True)
        ]
        device = next(x.device for x in memory if x is not None)
        return id(self.kernel), device, self._dtypes, *numbers, *self.options.items()


# Compiled code is shared by plans that differ in sizes alone. As many as Triton itself keeps: one for each variant.
_compiled: dict[tuple, Any] = {}

Results = Iterable[Operand | None]


@dataclass(frozen=True, slots=True)
class Plan:
    """Buffers and launches of a call.

    Attributes:
        device: of all tensors.
        copies: indices of inputs that have to be made contiguous for the kernels.
        needs_alignment: the kernels read no inputs that are not aligned to 16 bytes.
        needs_scratch: the kernels keep descriptors of TMA in memory.
        buffers: functions that allocate them. Kernels may overlap, so all live until everything is launched.
        launches: in order.
        results: indices among inputs and buffers.
    """

    device: torch.device
    copies: tuple[int, ...]
    needs_alignment: bool
    needs_scratch: bool
    buffers: tuple[Callable[[], Tensor], ...]
    launches: tuple[Launch, ...]
    results: tuple[int, ...]

    def run(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """The results, for inputs with the metadata that the plan was made for."""
        memory: list[Any] = [*inputs]
        for i in self.copies:
            memory[i] = memory[i].contiguous()
        memory += [allocate() for allocate in self.buffers]
        memory.append(None)
        addresses = [None if x is None else x.data_ptr() for x in memory]
        is_aligned = reduce(or_, filter(None, addresses), 0) % 16 == 0
        if not is_aligned and self.needs_alignment:
            memory = [x if x is None or x.data_ptr() % 16 == 0 else _aligned(x) for x in memory]
            addresses = [None if x is None else x.data_ptr() for x in memory]
            is_aligned = True
        if self.needs_scratch:
            with_scratch(self.device).run(self._launch, memory, addresses, is_aligned)
        else:
            self._launch(memory, addresses, is_aligned)
        return [memory[i] for i in self.results]

    def _launch(self, memory: list[Tensor | None], addresses: list[int | None], is_aligned: bool) -> None:
        with torch.accelerator.device_index(self.device.index):
            for launch in self.launches:
                launch(memory, addresses, is_aligned)


class Planner:
    """Collects the buffers and launches of a plan.

    Attributes:
        precision: "ieee" or "tf32", of products of float32.
    """

    def __init__(self, device: torch.device, num_inputs: int, precision: str):
        self.device, self.precision = device, precision
        self.needs_alignment = self.needs_scratch = False
        self._num_inputs = num_inputs
        self._copies: list[int] = []
        self._buffers: list[Callable[[], Tensor]] = []
        self._launches: list[Launch] = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Operand:
        """A contiguous buffer, or result."""
        strides = _contiguous_strides(shape)
        self._buffers.append(partial(torch.empty_strided, shape, strides, dtype=dtype, device=self.device))
        return Operand(self._num_inputs + len(self._buffers) - 1, shape, strides, dtype)

    @overload
    def contiguous(self, x: Operand) -> Operand: ...
    @overload
    def contiguous(self, x: None) -> None: ...
    def contiguous(self, x: Operand | None) -> Operand | None:
        """An input, made contiguous when the plan is run."""
        if x is None or x.strides == (strides := _contiguous_strides(x.shape)):
            return x
        self._copies.append(x.index)
        return x._replace(strides=strides)

    def launch(self, kernel: Any, programs: int, options: dict[str, Any], /, **arguments: Any) -> None:
        """A launch of `programs` programs, none if there are none.

        Args:
            options: of the compiler: num_warps, maxnreg, launch_pdl.
            arguments: all arguments of the kernel: operands, which come first in its signature, numbers, constants.
        """
        if programs:
            self._launches.append(Launch(kernel, programs, arguments, options))

    def plan(self, results: Results) -> Plan:
        return Plan(
            self.device,
            tuple(self._copies),
            self.needs_alignment,
            self.needs_scratch,
            tuple(self._buffers),
            tuple(self._launches),
            tuple(x.index for x in results if x is not None),
        )


def planned(make_plan: Callable[..., Results], x: Inputs, *options: Any) -> Prepared:
    """A function that runs the plan which `make_plan(planner, operands, *options)` describes.

    Args:
        make_plan: returns the operands to return as tensors, of those that stand for the inputs and of buffers; None
            for those that are not asked for.
        x: metadata of the inputs, on one device; the first one is given.
    """

    def plan(precision: str) -> Plan:
        planner = Planner(x[0].device, len(x), precision)
        operands = [None if y is None else Operand(i, y.shape, y.strides, y.dtype) for i, y in enumerate(x)]
        return planner.plan(make_plan(planner, type(x)(*operands), *options))

    if x[0].dtype != torch.float32:
        return plan("ieee").run
    plan_once = cache(plan)
    return lambda inputs: plan_once(product_precision(torch.float32)).run(inputs)


def clear() -> None:
    """Forget all plans, and compiled code."""
    calls.clear()
    _compiled.clear()


def strides(**operands: Operand) -> dict[str, int]:
    """`stride_qb`, `stride_qt` and `stride_qh` for an operand q, and so on."""
    found = {}
    for name, operand in operands.items():
        of_batch, of_token, of_head = _STRIDES[name]
        found[of_batch], found[of_token], found[of_head] = operand.token_strides
    return found


class _StrideNames(dict):
    def __missing__(self, name: str) -> tuple[str, ...]:
        names = self[name] = tuple([f"stride_{name}{dim}" for dim in "bth"])
        return names


_STRIDES = _StrideNames()


def _aligned(x: Tensor) -> Tensor:
    """A copy of the memory of `x`, with the same strides; no strides are 0."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = x.as_strided((max(extent, 0),), (1,)).clone()
    return memory.as_strided(x.shape, x.stride())


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(map(max, shape[:0:-1], repeat(1)), mul, initial=1))[::-1] if shape else ()


def with_scratch(device: torch.device) -> Context:
    """A context in which kernels find memory for what they keep outside of their tensors: descriptors of TMA.

    The memory lives as long as the context. An allocator that the caller has set stays.
    """
    scratch: list[Tensor] = []

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        scratch.append(torch.empty(size, dtype=torch.int8, device=device))
        return scratch[-1]

    context = copy_context()
    context.run(triton.set_allocator, allocate)
    return context
