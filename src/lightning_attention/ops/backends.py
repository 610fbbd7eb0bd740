"""The backends, in the order in which backend="auto" asks them."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from . import chunked, hopper, reference, triton
from .calls import Inputs, Prepared
from .inputs import (
    AppendInputs,
    AttentionInputs,
    DecodingInputs,
    FoldInputs,
    GradientInputs,
    Metadata,
    PrefillInputs,
    ReadInputs,
    SlotPrefillInputs,
    WriteInputs,
)
from .problem import Problem
from .values import (
    check_append_values,
    check_attention_values,
    check_decoding_values,
    check_fold_values,
    check_prefill_values,
    check_slot_prefill_values,
    check_update_values,
)


class Backend(Protocol):
    """Implementation of calls that `problem.py` has checked; shapes and formulas are those of the public functions.

    A backend refuses by `unsupported_reasons` what it cannot do; nothing falls back in silence. All functions from
    `forward` on prepare a call from the metadata of its inputs: they return the function that computes. `step` and
    `commit` update the state in place, as `prefill_` does; `read_state_` updates its `o`.
    """

    # True if decoding never waits for the device, so that a CUDA graph can record it.
    supports_cuda_graphs: bool

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Every reason why the backend cannot run this problem."""
        ...

    def is_slow(self, problem: Problem) -> bool:
        """True if a backend after this one is preferable."""
        ...

    def forward(
        self, x: AttentionInputs[Metadata], scale: float, output_final_state: bool, invariant: bool = False
    ) -> Prepared:
        """Computes `o`, and the final state if it is asked for; see `lightning_attention` for `invariant`."""
        ...

    def backward(self, x: GradientInputs[Metadata], scale: float, invariant: bool = False) -> Prepared:
        """Computes `dq`, `dk`, `dv`, and `d_initial_state` if there is an initial state."""
        ...

    def prefill(self, x: PrefillInputs[Metadata], scale: float) -> Prepared:
        """Computes `o`, the final state, and the states `[B, M, H, K, V]` after `state_positions` `[M]` tokens."""
        ...

    def prefill_(self, x: SlotPrefillInputs[Metadata], scale: float) -> Prepared:
        """Computes `o`, and updates slots of the state."""
        ...

    def step(self, x: DecodingInputs[Metadata], scale: float) -> Prepared:
        """Computes `o` of one token `[B, H, D]` or of several `[B, T, H, D]`."""
        ...

    def verify(self, x: DecodingInputs[Metadata], scale: float) -> Prepared:
        """Computes `o` of drafts."""
        ...

    def commit(self, x: DecodingInputs[Metadata]) -> Prepared:
        """Updates the state by the accepted drafts. q is not read."""
        ...

    def chunk_size(self, problem: Problem) -> int:
        """Tokens of a chunk in an invariant forward pass, which depend on dtype and head sizes alone."""
        ...

    def append(self, x: AppendInputs[Metadata], scale: float, update: bool) -> Prepared:
        """Computes `o` of tokens after those of decoding states, to the last bit as an invariant forward pass would.

        With `update`, complete chunks are added to the states, and the tokens after them replace the ring.
        """
        ...

    def fold(self, x: FoldInputs[Metadata]) -> Prepared:
        """Updates states by the tokens of their rings, which are empty then. Computes nothing else."""
        ...

    def write_state(self, x: WriteInputs[Metadata], reverse: bool) -> Prepared:
        """Computes `Σ_i λ^(T-1-i) k_i v_iᵀ` `[B, H, K, V]`, or in reverse `Σ_i λ^(i+1) k_i v_iᵀ`."""
        ...

    def read_state_(self, x: ReadInputs[Metadata], reverse: bool, add: bool) -> Prepared:
        """Computes `o_i = λ^(i+1) q_i S`, or with `add` `o_i += ...`; in reverse the weight is `λ^(T-1-i)`."""
        ...


class _InPyTorch:
    """A backend of a module's functions that compute from inputs and options, with nothing to prepare.

    They are invariant in any case.
    """

    def __init__(self, module: ModuleType):
        self._module = module
        self.supports_cuda_graphs = module.supports_cuda_graphs
        self.unsupported_reasons, self.is_slow = module.unsupported_reasons, module.is_slow
        self.chunk_size = module.chunk_size

    def forward(
        self, x: AttentionInputs[Metadata], scale: float, output_final_state: bool, invariant: bool = False
    ) -> Prepared:
        return lambda x: self._module.forward(x, scale, output_final_state)

    def backward(self, x: GradientInputs[Metadata], scale: float, invariant: bool = False) -> Prepared:
        return lambda x: self._module.backward(x, scale)

    def __getattr__(self, name: str) -> Callable[..., Prepared]:
        compute = getattr(self._module, name)

        def prepare(x: Inputs, *options: Any) -> Prepared:
            return lambda x: compute(x, *options)

        setattr(self, name, prepare)
        return prepare


class _Combined:
    """A backend of a module's functions, and of another module's where the first has none."""

    def __init__(self, first: ModuleType, second: ModuleType):
        self._modules = first, second

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        first, second = self._modules
        return first.unsupported_reasons(problem) or second.unsupported_reasons(problem)

    def __getattr__(self, name: str) -> Any:
        first, second = self._modules
        value = getattr(first, name) if hasattr(first, name) else getattr(second, name)
        setattr(self, name, value)
        return value


BACKENDS: dict[str, Backend] = {
    "hopper": cast(Backend, _Combined(hopper, triton)),
    "triton": cast(Backend, triton),
    "chunked": cast(Backend, _InPyTorch(chunked)),
    "reference": cast(Backend, _InPyTorch(reference)),
}


def choose_backend(name: str, problem: Problem, *, invariant: bool = False) -> str:
    """The backend to run: the one named, or for "auto" the first that can and is not slow.

    With `invariant` it may be slow, and the choice depends on device, dtype and head sizes alone.
    """
    if name == "auto":
        able = (name for name, backend in BACKENDS.items() if not backend.unsupported_reasons(problem))
        name = next((name for name in able if invariant or not BACKENDS[name].is_slow(problem)), name)
    check_supported(name, problem)
    if invariant and isinstance(BACKENDS[name], _InPyTorch) and problem.device.type not in ("cpu", "meta"):
        sizes = f"{problem.dtype}, K = {problem.key_dim} and V = {problem.value_dim}"
        raise NotImplementedError(
            f"backend {name!r} is not invariant on {problem.device}, where bits of products depend on their shapes, "
            f"and no other runs {sizes} there"
        )
    return name


def choose_by_chunk_size(name: str, problem: Problem, chunk_size: int) -> str:
    """The backend to run on decoding states: the one named, or for "auto" the first with chunks of their size."""
    able = [name for name, backend in BACKENDS.items() if not backend.unsupported_reasons(problem)]
    found = {name: BACKENDS[name].chunk_size(problem) for name in able}
    if name == "auto":
        name = next((name for name, size in found.items() if size == chunk_size), name)
    else:
        check_supported(name, problem)
    if found.get(name) != chunk_size:
        sizes = ", ".join(f"{size} in {name!r}" for name, size in found.items())
        raise ValueError(
            f"the decoding state has chunks of {chunk_size} tokens, which {name!r} does not work in; for these inputs "
            f"they have {sizes}: make it by DecodingState.zeros, with the backend and dtype that it is used with"
        )
    return name


def check_supported(name: str, problem: Problem) -> None:
    """Refuse a name of a backend that there is not, or that cannot run the problem."""
    if name == "auto":
        return
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if reasons := BACKENDS[name].unsupported_reasons(problem):
        raise NotImplementedError(f"backend {name!r} cannot run this: {'; '.join(reasons)}")


# Checks of the metadata of each operator, and of values on a CPU; those of a gradient are checked before the forward.
CHECKS: dict[str, tuple[Callable[..., Problem], Callable[..., None] | None]] = {
    "forward": (Problem.of_attention, check_attention_values),
    "backward": (Problem.of_gradient, None),
    "prefill": (Problem.of_prefill, check_prefill_values),
    "prefill_": (Problem.of_slot_prefill, check_slot_prefill_values),
    "step": (Problem.of_step, check_update_values),
    "verify": (Problem.of_drafts, check_decoding_values),
    "commit": (Problem.of_accepted_drafts, check_update_values),
    "append": (Problem.of_append, check_append_values),
    "fold": (Problem.of_fold, check_fold_values),
}
# Operators on decoding states, and those that may be invariant, by their last option.
ON_RINGS, MAY_BE_INVARIANT = ("append", "fold"), ("forward", "backward")


def check_metadata(operator: str, x: Inputs, backend: str) -> None:
    """Check inputs of an operator but for values. No backend is chosen."""
    problem_of, _ = CHECKS[operator]
    check_supported(backend, problem_of(x))


def check_inputs(operator: str, x: Inputs, backend: str) -> None:
    """Check inputs of an operator before another one runs that changes them."""
    check_metadata(operator, x, backend)
    _, check_values = CHECKS[operator]
    if check_values is not None and not torch.compiler.is_compiling():
        check_values(x)


def prepare(x: Inputs, operator: str, backend: str, *options: Any) -> Prepared:
    """Check the metadata of inputs, choose a backend, and prepare the call."""
    problem_of, check_values = CHECKS[operator]
    problem = problem_of(x)
    if operator in ON_RINGS:
        name = choose_by_chunk_size(backend, problem, x.keys.shape[2])
    else:
        name = choose_backend(backend, problem, invariant=operator in MAY_BE_INVARIANT and options[-1])
    compute = getattr(BACKENDS[name], operator)(x, *options)
    if check_values is None or not any(y is not None and y.device.type == "cpu" for y in x):
        return compute

    def checked(x: Inputs) -> list[Tensor]:
        check_values(x)
        return compute(x)

    return checked
