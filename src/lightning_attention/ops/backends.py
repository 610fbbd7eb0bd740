"""The backends, in the order in which backend="auto" asks them."""

from types import ModuleType
from typing import Any, Protocol, cast

from torch import Tensor

from . import chunked, hopper, reference, triton
from .problem import AttentionInputs, DecodingInputs, Problem


class Backend(Protocol):
    """A module with these functions, which get inputs that `problem.py` has checked.

    Shapes and formulas are those of the public functions. A backend refuses by `unsupported_reasons` what it cannot
    do; nothing falls back in silence. Functions whose names end in `_`, and `step` and `commit`, write in place.
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
        self, x: AttentionInputs[Tensor], scale: float, output_final_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`o` and the final state, if it is asked for."""
        ...

    def backward(
        self, x: AttentionInputs[Tensor], do: Tensor, d_final_state: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`dq`, `dk`, `dv`, and `d_initial_state` if there is an initial state."""
        ...

    def prefill(
        self, x: AttentionInputs[Tensor], state_positions: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`o`, the final state, and the states `[B, M, H, K, V]` after `state_positions` `[M]` tokens."""
        ...

    def step(self, x: DecodingInputs[Tensor], scale: float) -> Tensor:
        """`o` of one token `[B, H, D]` or of several `[B, T, H, D]`; updates the state."""
        ...

    def verify(self, x: DecodingInputs[Tensor], scale: float) -> Tensor:
        """`o` of drafts."""
        ...

    def commit(self, x: DecodingInputs[Tensor]) -> None:
        """Update the state by the accepted drafts; there is at least one draft. q is not read."""
        ...

    def write_state(self, k: Tensor, v: Tensor, log_decay: Tensor, *, reverse: bool) -> Tensor:
        """`Σ_i λ^(T-1-i) k_i v_iᵀ` `[B, H, K, V]`, or in reverse `Σ_i λ^(i+1) k_i v_iᵀ`."""
        ...

    def read_state_(self, o: Tensor, q: Tensor, state: Tensor, log_decay: Tensor, *, reverse: bool, add: bool) -> None:
        """`o_i = λ^(i+1) q_i S`, or with `add` `o_i += ...`; in reverse the weight is `λ^(T-1-i)`."""
        ...


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
    "chunked": cast(Backend, chunked),
    "reference": cast(Backend, reference),
}


def choose_backend(name: str, problem: Problem) -> str:
    """The backend to run: the one named, or for "auto" the first that can and is not slow."""
    if name == "auto":
        for name, backend in BACKENDS.items():
            if not backend.unsupported_reasons(problem) and not backend.is_slow(problem):
                return name
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if reasons := BACKENDS[name].unsupported_reasons(problem):
        raise NotImplementedError(f"backend {name!r} cannot run this: {'; '.join(reasons)}")
    return name
