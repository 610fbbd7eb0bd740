"""Inputs, the exact result in float64, and the tolerance rule of the suite."""

import os
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_attention import lightning_attention
from lightning_attention.ops import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETED
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

# The Triton kernels run on a GPU, or on a CPU under Triton's interpreter: see conftest.py.
BACKENDS = ("chunked", "reference", pytest.param("triton", marks=pytest.mark.triton))


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and HAS_GPU else "cpu"


def dtype_of(backend: str) -> torch.dtype:
    """The most precise dtype of a backend."""
    return torch.float32 if backend == "triton" else torch.float64


def attention(backend: str = "auto"):
    """Return `lightning_attention` with `output_final_state=True`."""

    def call(q, k, v, log_decay, **options) -> tuple[Tensor, Tensor]:
        o, state = lightning_attention(q, k, v, log_decay, output_final_state=True, backend=backend, **options)
        assert state is not None
        return o, state

    return call


@dataclass(frozen=True)
class Case:
    """Sizes of one call. `lengths` packs sequences into one batch row."""

    B: int = 2
    T: int = 37
    H: int = 3
    K: int = 16
    V: int = 16
    lengths: tuple[int, ...] | None = None
    slope: float | None = 1.0  # of the head that decays fastest; None is no decay
    scale: float = 1.0
    state: bool = True

    def __str__(self) -> str:
        default = Case()
        changed = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(default, name)]
        return ",".join(changed).replace(" ", "") or "default"


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    do: Tensor
    d_final_state: Tensor

    def amid_nan(self, margin: int = 2) -> "Inputs":
        """Place every tensor inside a larger one full of NaN."""

        def surrounded(x: Tensor) -> Tensor:
            larger = x.new_full([size + 2 * margin for size in x.shape], float("nan"))
            return larger[tuple(slice(margin, margin + size) for size in x.shape)].copy_(x)

        names = ("q", "k", "v", "initial_state", "do")
        return replace(self, **{name: surrounded(getattr(self, name)) for name in names})

    def on(self, device: str) -> "Inputs":
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)})

    def to(self, dtype: torch.dtype) -> "Inputs":
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        cast = {name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "do")}
        state = self.initial_state
        return replace(
            self,
            **cast,
            initial_state=None if state is None else state.to(state_dtype),
            d_final_state=self.d_final_state.to(state_dtype),
        )

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def state(self) -> Tensor:
        """The initial state of a case that has one."""
        assert self.initial_state is not None
        return self.initial_state

    def options(self) -> dict:
        return {"initial_state": self.initial_state, "cu_seqlens": self.cu_seqlens, "scale": self.scale}


def make_inputs(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    B, T = (case.B, case.T) if case.lengths is None else (1, sum(case.lengths))
    N = B if case.lengths is None else len(case.lengths)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    cu_seqlens = None if case.lengths is None else torch.tensor([0, *case.lengths]).cumsum(0)
    log_decay = None if case.slope is None else -case.slope * torch.arange(1, case.H + 1) / case.H
    return Inputs(
        q=randn(B, T, case.H, case.K),
        k=randn(B, T, case.H, case.K),
        v=randn(B, T, case.H, case.V),
        log_decay=log_decay,
        initial_state=randn(N, case.H, case.K, case.V, dtype=state_dtype) if case.state else None,
        cu_seqlens=cu_seqlens,
        scale=case.scale,
        do=randn(B, T, case.H, case.V),
        d_final_state=randn(N, case.H, case.K, case.V, dtype=state_dtype),
    )


def run(attention, inputs: Inputs) -> dict[str, Tensor]:
    """Return outputs and gradients of `attention(q, k, v, log_decay, initial_state=, cu_seqlens=, scale=)`."""
    given = {name: getattr(inputs, name) for name in ("q", "k", "v", "initial_state")}
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}
    inputs = replace(inputs, **leaves)
    o, final_state = attention(*inputs.qkv, inputs.log_decay, **inputs.options())
    outputs = [(x, dx) for x, dx in ((o, inputs.do), (final_state, inputs.d_final_state)) if x.requires_grad]
    gradients = torch.autograd.grad(
        [x for x, _ in outputs],
        list(leaves.values()),
        [dx for _, dx in outputs],
        allow_unused=True,
        materialize_grads=True,
    )
    return {"o": o, "final_state": final_state} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def definition(q, k, v, log_decay, *, initial_state, cu_seqlens, scale):
    """The recurrence token by token, differentiated by autograd without the library's backward pass."""
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    sequences = (
        [(q[b : b + 1], k[b : b + 1], v[b : b + 1]) for b in range(q.shape[0])]
        if bounds is None
        else [(q[:, s:e], k[:, s:e], v[:, s:e]) for s, e in pairwise(bounds)]
    )
    state_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    outputs, states = [], []
    for n, sequence in enumerate(sequences):
        empty = q.new_zeros(1, q.shape[2], q.shape[3], v.shape[3], dtype=state_dtype)
        state = empty if initial_state is None else initial_state[n : n + 1]
        o, state = reference.recurrence(*sequence, log_decay, scale, state)
        outputs.append(o.to(q.dtype))
        states.append(state)
    return torch.cat(outputs, dim=0 if bounds is None else 1), torch.cat(states)


def plain(q, k, v, log_decay, *, initial_state, cu_seqlens, scale):
    """Plain PyTorch: masked products in the dtype of the inputs, one sequence at a time."""
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for n in range(q.shape[0] if bounds is None else len(bounds) - 1):
        at = (slice(n, n + 1),) if bounds is None else (slice(None), slice(bounds[n], bounds[n + 1]))
        qs, ks, vs = (x[at].transpose(1, 2) for x in (q, k, v))
        t = torch.arange(qs.shape[2], device=q.device)
        decay = torch.zeros(q.shape[2], device=q.device) if log_decay is None else log_decay
        distance = (t[:, None] - t).clamp_min(0)
        mask = torch.exp(decay[:, None, None] * distance).tril().to(q.dtype)
        o = scale * ((qs @ ks.mT) * mask) @ vs
        write = torch.exp(decay[:, None] * t.flip(0))[..., None].to(q.dtype)
        state = ((ks * write).mT @ vs).to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        if initial_state is not None:
            read = torch.exp(decay[:, None] * (t + 1))[..., None].to(q.dtype)
            o = o + scale * (qs * read) @ initial_state[n : n + 1].to(q.dtype)
            state = state + torch.exp(decay * len(t))[:, None, None] * initial_state[n : n + 1]
        outputs.append(o.transpose(1, 2))
        states.append(state)
    return torch.cat(outputs, dim=0 if bounds is None else 1), torch.cat(states)


def error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square error relative to the root mean square of the exact result."""
    if exact.numel() == 0:
        return 0.0
    difference = (actual.to(exact.device).double() - exact).square().mean().sqrt()
    return (difference / exact.square().mean().sqrt().clamp_min(1e-30)).item()


def assert_accurate(actual: dict[str, Tensor], inputs: Inputs, *, is_long: bool = False) -> None:
    """Assert that errors against float64 are at most twice those of plain PyTorch in the same dtype, plus a rounding.

    Args:
        is_long: take the chunkwise algorithm in float64 for exact, because the recurrence would take too long.
    """
    wide = inputs.to(torch.float64)
    exact = run(attention("chunked"), wide) if is_long else run(definition, wide.on("cpu"))
    baseline = run(plain, inputs)
    for name, value in actual.items():
        assert value.shape == exact[name].shape, name
        rounding = torch.finfo(value.dtype).eps
        allowed = 2 * error(baseline[name], exact[name]) + rounding
        assert error(value, exact[name]) <= allowed, f"{name}: {error(value, exact[name]):.2e} > {allowed:.2e}"


def assert_segments_remember_the_past(attention, device: str, start: int, dtype: torch.dtype = torch.float16) -> None:
    """Assert that outputs after `start` contain earlier tokens, 10,000 times larger but weighing under exp(-12)."""
    inputs = make_inputs(Case(B=1, T=start + 128, K=64, V=64, H=1, slope=0.1, state=False), dtype)
    for x in (inputs.k, inputs.v):
        x[:, : start - 120] *= 100
    inputs = replace(inputs, scale=1e-3).on(device)  # keeps outputs of large tokens in the range of float16
    exact, actual, baseline = (
        f(*x.qkv, x.log_decay, **x.options())[0][:, start : start + 8]
        for f, x in ((definition, inputs.to(torch.float64).on("cpu")), (attention, inputs), (plain, inputs))
    )
    assert error(actual, exact) <= 2 * error(baseline, exact) + torch.finfo(dtype).eps


def assert_state_is_float32_between_chunks(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Assert that the final state is as accurate as if keys were rounded once, so not rounded after each chunk.

    The decay has to be slow, for the rounding of many chunks to add up.
    """
    inputs = make_inputs(case, dtype)
    assert inputs.log_decay is not None
    weights = torch.exp(inputs.log_decay.double() * torch.arange(case.T - 1, -1, -1)[:, None])[..., None]
    decayed = inputs.k * weights
    exact, rounded = (
        torch.einsum("bthk,bthv->bhkv", k.double(), inputs.v.double()) for k in (decayed, decayed.to(dtype))
    )
    inputs = inputs.on(device_of(backend) if backend != "hopper" else "cuda")
    _, state = attention(backend)(*inputs.qkv, inputs.log_decay)
    assert state.dtype == torch.float32
    assert error(state.cpu(), exact) < (1e-4 if backend in ("chunked", "reference") else 2 * error(rounded, exact))
