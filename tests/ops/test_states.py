"""`write_state` and `read_state_` of every backend against their formulas."""

from collections.abc import Callable

import pytest
import torch
from oracle import device_of, error
from torch import Tensor

from lightning_attention.distributed.states import read_state_, write_state
from lightning_attention.ops import states
from lightning_attention.ops.gpu.segments import Segments, ceil_div
from lightning_attention.ops.states import finite_log_decay
from lightning_attention.ops.triton import config

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
RUNS = [
    pytest.param("chunked", FP32, id="pytorch-float32"),
    pytest.param("chunked", BF16, id="pytorch-bfloat16"),
    pytest.param("triton", FP32, id="kernels-float32", marks=pytest.mark.triton),
    pytest.param("triton", FP16, id="kernels-float16", marks=pytest.mark.triton),
    pytest.param("triton", BF16, id="kernels-bfloat16", marks=pytest.mark.gpu),
]
# B, T, H, X, Y and the slope of the head that decays fastest; None is no decay.
SIZES = [
    (1, 37, 2, 16, 16, 1.0),
    (2, 140, 1, 24, 40, 0.02),
    (1, 130, 1, 20, 70, None),
    (1, 100, 2, 16, 16, 100.0),
    (1, 100, 2, 16, 32, float("inf")),
    (1, 1, 1, 5, 3, 1.0),
    (2, 0, 2, 16, 8, 1.0),
]

runs = pytest.mark.parametrize(("backend", "dtype"), RUNS)
sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@pytest.fixture(autouse=True)
def short_cuts(monkeypatch):
    """Give most sequences several intervals, programs and chunks."""

    def cut(length: int, *_: int) -> Segments:
        return Segments(ceil_div(max(length, 1), 64) * 64, 64, 2)

    monkeypatch.setattr(config, "one_segment", cut)
    monkeypatch.setattr(config, "TOKENS_PER_READ", 96)
    monkeypatch.setattr(states, "CHUNK_SIZE", 60)


def surrounded(*shape: int, seed: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return random numbers inside of a larger tensor full of NaN, and the larger tensor."""
    larger = torch.full([size + 4 for size in shape], float("nan"), dtype=dtype, device=device)
    inner = larger[tuple(slice(2, 2 + size) for size in shape)]
    inner.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64))
    return inner, larger


def make_log_decay(slope: float | None, x: Tensor) -> Tensor:
    H = x.shape[2]
    return finite_log_decay(x, None if slope is None else -slope * torch.arange(1, H + 1, device=x.device) / H)


def weights(log_decay: Tensor, T: int, *, rising: bool) -> Tensor:
    """Return `λ^1 .. λ^T` or `λ^(T-1) .. λ^0`, `[T, H, 1]`."""
    exponents = torch.arange(1, T + 1) if rising else torch.arange(T - 1, -1, -1)
    return torch.exp(log_decay.cpu().double() * exponents[:, None])[..., None]


def assert_follows(actual: Tensor, formula: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> None:
    """Assert that the error is at most twice that of the formula in the dtype of the inputs, plus one rounding."""
    exact = formula(FP64)
    allowed = 2 * error(formula(dtype), exact) + torch.finfo(actual.dtype).eps
    assert actual.shape == exact.shape
    assert error(actual.cpu(), exact) <= allowed


@runs
@sizes
@directions
def test_written_states_match_the_formula(backend, dtype, sizes, reverse):
    B, T, H, X, Y, slope = sizes
    x, y = (surrounded(B, T, H, D, seed=D, dtype=dtype, device=device_of(backend))[0] for D in (X, Y))
    log_decay = make_log_decay(slope, x)
    state = write_state(backend, x, y, log_decay, reverse=reverse)
    assert state.dtype == FP32

    def formula(dtype: torch.dtype) -> Tensor:
        decayed = x.cpu() * weights(log_decay, T, rising=reverse)
        return torch.einsum("bthx,bthy->bhxy", decayed.to(dtype), y.cpu().to(dtype))

    assert_follows(state, formula, dtype)


@runs
@sizes
@directions
@pytest.mark.parametrize("add", [False, True], ids=["fresh", "added"])
def test_reads_match_the_formula_and_touch_nothing_else(backend, dtype, sizes, reverse, add):
    B, T, H, X, Y, slope = sizes
    device = device_of(backend)
    x, _ = surrounded(B, T, H, X, seed=1, dtype=dtype, device=device)
    S, _ = surrounded(B, H, X, Y, seed=2, dtype=FP32, device=device)
    out, surroundings = surrounded(B, T, H, Y, seed=3, dtype=dtype, device=device)
    before = out.cpu().clone()
    if not add:
        out.fill_(float("nan"))
    log_decay = make_log_decay(slope, x)
    read_state_(backend, out, x, S, log_decay, reverse=reverse, add=add)

    def formula(dtype: torch.dtype) -> Tensor:
        decayed = x.cpu() * weights(log_decay, T, rising=not reverse)
        read = torch.einsum("bthx,bhxy->bthy", decayed.to(dtype), S.cpu().to(dtype))
        return read + before.to(dtype) if add else read

    assert_follows(out, formula, dtype)
    assert (~surroundings.isnan()).sum() == out.numel()
