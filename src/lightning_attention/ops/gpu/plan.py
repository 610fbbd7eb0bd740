"""Plans: the launches of a call, prepared once for inputs of given metadata.

A backend describes a call to a `Planner`, by a pure function of the shapes, strides and dtypes of its inputs and of
options. The `Plan` that comes out is kept in one bounded cache. Every call looks its plan up, allocates and launches.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextvars import Context, copy_context
from functools import lru_cache, reduce
from itertools import accumulate, repeat
from operator import itemgetter, mul, or_
from typing import Any, NamedTuple, TypeAlias, overload

import torch
import triton
from torch import Tensor

MAX_PLANS = 1024
CONTIGUOUS = torch.contiguous_format


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


# Stand for the inputs of a call, in order; None for an input that is None.
Operands: TypeAlias = list[Any]


CONSTANT, SPECIALIZED, NOT_SPECIALIZED = "constant", "specialized", "not specialized"


class _Signature:
    """The parameters of a kernel, in order.

    Attributes:
        kernel: kept, since its id is a key.
        kinds: what compiled code depends on, by parameter: its value, properties of the value, or nothing.
    """

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
        return self._pick(arguments)


_signatures: dict[int, _Signature] = {}  # by id: Triton hashes a kernel's code


class Launch:
    """One launch of a kernel over a one-dimensional grid.

    Triton inspects all arguments at every launch, in 15 µs. Code that is compiled for aligned addresses is kept and
    launched directly from then on: all else that it depends on is fixed by the plan.
    """

    def __init__(self, kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, Any]):
        signature = _signatures.get(id(kernel)) or _signatures.setdefault(id(kernel), _Signature(kernel))
        values = signature.in_order(arguments)
        num_pointers = len(values)
        while not isinstance(values[num_pointers - 1], Operand):
            num_pointers -= 1
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


# Compiled code is shared by plans that differ in sizes alone.
_compiled: dict[tuple, Any] = {}

Results = Iterable[Operand | None]


class Plan(NamedTuple):
    """Buffers and launches of a call.

    Attributes:
        device: of all tensors.
        copies: indices of inputs that have to be made contiguous for the kernels.
        needs_alignment: the kernels read no inputs that are not aligned to 16 bytes.
        needs_scratch: the kernels keep descriptors of TMA in memory.
        buffers: shapes, strides and dtypes. Kernels may overlap, so all live until everything is launched.
        launches: in order.
        results: indices among inputs and buffers, or None.
    """

    device: torch.device
    copies: tuple[int, ...]
    needs_alignment: bool
    needs_scratch: bool
    buffers: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    launches: tuple[Launch, ...]
    results: tuple[int | None, ...]

    def run(self, inputs: Sequence[Tensor | None]) -> list[Any]:
        """The results, tensors or None, for inputs with the metadata that the plan was made for."""
        device = self.device
        memory = [*inputs]
        for i in self.copies:
            memory[i] = _contiguous(inputs[i])
        for shape, strides, dtype in self.buffers:
            memory.append(torch.empty_strided(shape, strides, dtype=dtype, device=device))
        memory.append(None)
        if self.needs_scratch:
            with_scratch(device).run(self._launch, memory)
        else:
            self._launch(memory)
        return [None if i is None else memory[i] for i in self.results]

    def _launch(self, memory: list[Tensor | None]) -> None:
        addresses = [None if x is None else x.data_ptr() for x in memory]
        is_aligned = reduce(or_, filter(None, addresses), 0) % 16 == 0
        with torch.accelerator.device_index(self.device.index):
            for launch in self.launches:
                launch(memory, addresses, is_aligned)


class Planner:
    """Collects the buffers and launches of a plan."""

    def __init__(self, device: torch.device, num_inputs: int):
        self.device = device
        self.needs_alignment = self.needs_scratch = False
        self._num_inputs = num_inputs
        self._copies: list[int] = []
        self._buffers: list[tuple] = []
        self._launches: list[Launch] = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Operand:
        """A contiguous buffer, or result."""
        strides = _contiguous_strides(shape)
        self._buffers.append((shape, strides, dtype))
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
            tuple(None if x is None else x.index for x in results),
        )


def run(make_plan: Callable[..., Results], inputs: Sequence[Tensor | None], *options: Hashable) -> list[Any]:
    """Run the plan that `make_plan(planner, operands, *options)` describes, once for all inputs of some metadata.

    Args:
        make_plan: returns the operands to return as tensors, of those that stand for the inputs and of buffers.
        inputs: tensors on one device; the first one is given.
        options: all else that the plan depends on.
    """
    first = inputs[0]
    assert first is not None
    metadata = tuple([None if x is None else (x.shape, x.stride(), x.dtype) for x in inputs])
    plan = _plan(make_plan, first.device, metadata, options)
    if plan.needs_alignment and any(x is not None and x.data_ptr() % 16 for x in inputs):
        aligned = [x if x is None or x.data_ptr() % 16 == 0 else x.clone(memory_format=CONTIGUOUS) for x in inputs]
        return run(make_plan, aligned, *options)
    return plan.run(inputs)


@lru_cache(MAX_PLANS)
def _plan(make_plan: Callable[..., Results], device: torch.device, metadata: tuple, options: tuple) -> Plan:
    planner = Planner(device, len(metadata))
    operands = [None if x is None else Operand(i, *x) for i, x in enumerate(metadata)]
    return planner.plan(make_plan(planner, operands, *options))


def clear() -> None:
    """Forget all plans."""
    _plan.cache_clear()
    _compiled.clear()


def strides(**operands: Operand) -> dict[str, int]:
    """`stride_qb`, `stride_qt` and `stride_qh` for an operand q, and so on."""
    return {
        f"stride_{name}{dim}": stride
        for name, operand in operands.items()
        for dim, stride in zip("bth", operand.token_strides, strict=True)
    }


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


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
