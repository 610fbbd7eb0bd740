"""float16 inputs whose scores or states leave the range of float16 while results stay inside."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from oracle import HAS_GPU, Case, Inputs, definition, make_inputs, run
from torch import Tensor

from lightning_attention import (
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_prefill,
    lightning_attention_step,
    lightning_attention_verify,
)
from lightning_attention.distributed.states import read_state_, write_state

FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64
EPS = torch.finfo(FP16).eps
LARGEST = torch.finfo(FP16).max
SMALLEST_NORMAL = torch.finfo(FP16).smallest_normal

# Backends and devices. On a GPU "auto" must not choose a backend that overflows.
RUNS = [
    pytest.param("chunked", "cpu", id="chunked"),
    pytest.param("triton", "cuda" if HAS_GPU else "cpu", id="triton", marks=pytest.mark.triton),
    pytest.param("chunked", "cuda", id="chunked-cuda", marks=pytest.mark.gpu),
    pytest.param("auto", "cuda", id="auto-cuda", marks=pytest.mark.gpu),
]
runs = pytest.mark.parametrize(("backend", "device"), RUNS)


def scaled(q: float = 1, k: float = 1, v: float = 1, do: float = 1, S: float = 1, dS: float = 1) -> Callable:
    """Return a function that makes inputs of these magnitudes; dS is the gradient of the final state."""

    def make(case: Case) -> Inputs:
        x = make_inputs(case)
        state = None if x.initial_state is None else S * x.initial_state
        inputs = {"q": q * x.q, "k": k * x.k, "v": v * x.v, "do": do * x.do, "d_final_state": dS * x.d_final_state}
        return replace(x, **inputs, initial_state=state).to(FP16)

    return make


def with_a_huge_token(case: Case) -> Inputs:
    """Token 5 has scores of 10^7 and small values; the other tokens are ordinary."""
    x = make_inputs(case)
    for y, magnitude in ((x.q, 1000), (x.k, 1000), (x.v, 1e-3), (x.do, 1e-3)):
        y[:, 5] *= magnitude
    return x.to(FP16)


def all_positive(case: Case) -> Inputs:
    """Without cancellation and decay the state grows to 10^7, and q reads little of it."""
    x = scaled(q=1e-4, k=50, v=50, do=1e-4, S=1e6, dS=1e-3)(case)
    return replace(x, **{name: getattr(x, name).abs() for name in ("q", "k", "v", "do")})


LARGE_SCORES = scaled(q=300, k=300, v=1e-3, do=1e-3)
SMALL_SCORES = scaled(q=1e-3, k=1e-3, v=1000, do=1000)
LARGE_STATE = scaled(q=1e-4, k=1e-4, v=1e-4, do=1e-4, S=1e7, dS=1e7)
SMALL_STATE = scaled(q=1000, k=1e-3, v=1e-3, do=100, S=1e-7, dS=1e-2)
TABLE = {
    "large scores": (Case(), LARGE_SCORES),
    "large scores, one token": (Case(T=1, state=False), LARGE_SCORES),
    "large scores, odd sizes": (Case(T=77, K=20, V=36), LARGE_SCORES),
    "large scores, packed": (Case(lengths=(3, 0, 40, 1, 33)), LARGE_SCORES),
    "large scores, scale 1e-3": (Case(scale=1e-3), scaled(q=300, k=300, v=3, do=1e-1, S=1e4, dS=10)),
    "large scores, scale 1e3": (Case(scale=1e3), scaled(q=30, k=30, v=1e-4, do=1e-3, S=1e-2, dS=1e-3)),
    "small scores": (Case(), SMALL_SCORES),
    "small scores, odd sizes": (Case(T=77, K=20, V=36), SMALL_SCORES),
    "small scores, packed": (Case(lengths=(3, 0, 40, 1, 33)), SMALL_SCORES),
    "small scores, scale 1e-3": (Case(scale=1e-3), scaled(q=1e-2, k=1e-2, v=1e4, do=1e4, S=1e2, dS=0.1)),
    "small scores, scale 1e3": (Case(scale=1e3), scaled(q=1e-3, k=1e-3, v=10, do=10, S=0.1)),
    "large state": (Case(), LARGE_STATE),
    "large state, packed": (Case(lengths=(3, 0, 40, 1, 33), K=40, V=20), LARGE_STATE),
    "large state, scale 1e-3": (Case(scale=1e-3), scaled(S=1e6, dS=1e3)),
    "small state": (Case(slope=None), SMALL_STATE),
    "small state, scale 1e3": (Case(scale=1e3, slope=None), scaled(k=1e-2, v=1e-2, S=1e-6, do=1e-1, dS=1e-3)),
    "thousands of tokens": (Case(B=1, T=4100, H=1, slope=None), all_positive),
    "thousands of tokens, wide": (Case(B=1, T=2100, H=1, K=64, V=80, slope=1e-3), all_positive),
    "one huge token": (Case(T=40), with_a_huge_token),
    "one huge token, odd sizes": (Case(T=77, K=24, V=70, slope=0.1), with_a_huge_token),
}
table = pytest.mark.parametrize(("case", "make"), TABLE.values(), ids=TABLE.keys())


def assert_close(actual: Tensor, exact: Tensor, name: str = "") -> None:
    """Assert that no token is wrong by more than four roundings to float16 relative to the token's magnitude.

    Tokens are compared one by one, because a huge token would hide errors of the others. Magnitudes below the smallest
    normal float16 count as that.
    """
    assert actual.shape == exact.shape, name
    if actual.dtype == FP16:
        assert exact.abs().max() < LARGEST, f"{name}: the case is wrong, its exact result is not finite in float16"
    error = (actual.cpu().double() - exact.cpu()).square().mean(dim=(-2, -1)).sqrt()
    size = exact.cpu().square().mean(dim=(-2, -1)).sqrt()
    least = SMALLEST_NORMAL if actual.dtype == FP16 else 0.0
    assert (error <= 4 * EPS * size.clamp_min(least)).all(), f"{name}: {(error / size).max():.2e}"


@runs
@table
def test_outputs_and_gradients_are_accurate(backend, device, case, make):
    inputs = make(case)

    def attend(q, k, v, log_decay, **options):
        return lightning_attention(q, k, v, log_decay, output_final_state=True, backend=backend, **options)

    exact = run(definition, inputs.to(FP64))
    for name, value in run(attend, inputs.on(device)).items():
        assert_close(value, exact[name], name)


@runs
@table
def test_prefill_is_accurate(backend, device, case, make):
    inputs = make(case)
    x, wide = inputs.on(device), inputs.to(FP64)
    bounds = [0, *accumulate(case.lengths)] if case.lengths else [0, case.T]
    positions = sorted({bounds[-1], bounds[-1] // 2 + 1, 1})
    given = torch.tensor(positions, dtype=torch.int32, device=device)
    found = lightning_attention_prefill(
        x.q, x.k, x.v, x.log_decay, state_positions=given, backend=backend, **x.options()
    )
    o, final_state = definition(wide.q, wide.k, wide.v, wide.log_decay, **wide.options())
    assert_close(found.output, o)
    assert_close(found.final_state, final_state)
    for i, position in enumerate(positions):
        n, start = next((n, a) for n, (a, b) in enumerate(pairwise(bounds)) if a < position <= b)
        state = wide.initial_state
        if state is not None and case.lengths:
            state = state[n : n + 1]
        q, k, v = (y[:, start:position] for y in wide.qkv)
        _, expected = definition(q, k, v, wide.log_decay, initial_state=state, cu_seqlens=None, scale=case.scale)
        assert_close(found.states[:, i], expected)


TREE = [-1, 0, 0, 1, 1, 2, 5]
DRAFTS = {name: TABLE[name] for name in TABLE if "packed" not in name and "thousands" not in name}
drafts = pytest.mark.parametrize(("case", "make"), DRAFTS.values(), ids=DRAFTS.keys())
pools = pytest.mark.parametrize("state_dtype", [FP32, torch.bfloat16], ids=["float32", "bfloat16"])


def decoding(case: Case, make: Callable[[Case], Inputs], state_dtype: torch.dtype, length: int = 7) -> Inputs:
    """Make inputs of `length` tokens, with states of `state_dtype`."""
    inputs = make(replace(case, T=length, state=True))
    return replace(inputs, initial_state=inputs.state.to(state_dtype))


def assert_same_state(actual: Tensor, exact: Tensor) -> None:
    """Assert equality up to rounding to the dtype of the pool."""
    error = (actual.cpu().double() - exact).abs()
    assert (error <= 8 * torch.finfo(actual.dtype).eps * exact.abs().amax(dim=(-2, -1), keepdim=True)).all()


@runs
@drafts
@pools
def test_steps_are_accurate(backend, device, case, make, state_dtype):
    """Outputs come from the state in float32, in whatever dtype the pool is stored."""
    inputs = decoding(case, make, state_dtype)
    x, wide = inputs.on(device), inputs.to(FP64)
    state, exact = x.state.clone(), wide.state.clone()
    o = lightning_attention_step(*x.qkv, x.log_decay, state=state, scale=case.scale, backend=backend)
    expected = lightning_attention_step(*wide.qkv, wide.log_decay, state=exact, scale=case.scale, backend="reference")
    assert_close(o, expected)
    assert_same_state(state, exact)


@runs
@drafts
@pools
@pytest.mark.parametrize("parents", [None, TREE], ids=["chain", "tree"])
def test_drafts_are_accurate(backend, device, case, make, state_dtype, parents):
    inputs = decoding(case, make, state_dtype)
    x, wide = inputs.on(device), inputs.to(FP64)
    integers = [parents] * case.B if parents else None
    options = [{"parents": None if integers is None else torch.tensor(integers, device=y.q.device)} for y in (x, wide)]
    o, expected = (
        lightning_attention_verify(*y.qkv, y.log_decay, state=y.state, scale=case.scale, backend=name, **given)
        for y, name, given in zip((x, wide), (backend, "reference"), options, strict=True)
    )
    assert_close(o, expected)
    for y, name, given in zip((x, wide), (backend, "reference"), options, strict=True):
        last = torch.tensor([6] * case.B, device=y.q.device)
        lightning_attention_commit(y.k, y.v, y.log_decay, state=y.state, last=last, backend=name, **given)
    assert_same_state(x.state, wide.state)


@runs
@pools
@pytest.mark.parametrize("name", ["large scores", "small scores", "large state", "one huge token"])
def test_long_chains_of_drafts_are_accurate(backend, device, name, state_dtype):
    """The Triton backend verifies more than 64 drafts with the kernels of attention."""
    case, make = TABLE[name]
    inputs = decoding(case, make, state_dtype, length=70)
    x, wide = inputs.on(device), inputs.to(FP64)
    o, expected = (
        lightning_attention_verify(*y.qkv, y.log_decay, state=y.state, scale=y.scale, backend=backend)
        for y, backend in ((x, backend), (wide, "reference"))
    )
    assert_close(o, expected)


@pytest.mark.triton
@table
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_states_of_slices_are_accurate(case, make, reverse):
    """`write_state` and `read_state_`, which exchange states between ranks."""
    inputs = make(replace(case, lengths=None, state=True))
    x, wide = inputs.on("cuda" if HAS_GPU else "cpu"), inputs.to(FP64)
    slopes = inputs.log_decay if inputs.log_decay is not None else torch.zeros(case.H)
    T, log_decay = x.q.shape[1], slopes.to(x.q.device)
    ages = torch.arange(T, dtype=FP64)
    write, read = (ages + 1, T - 1 - ages) if reverse else (T - 1 - ages, ages + 1)
    written, weights = (torch.exp(slopes.double() * age[:, None]) for age in (write, read))

    state = write_state("triton", x.k, x.v, log_decay, reverse=reverse)
    assert_close(state, torch.einsum("th,bthk,bthv->bhkv", written, wide.k, wide.v))

    exact = torch.einsum("th,bthk,bhkv->bthv", weights, wide.q, case.scale * wide.state)
    is_read = weights.amax(dim=1) > SMALLEST_NORMAL
    for add in (False, True):
        o = x.do.clone()
        read_state_("triton", o, x.q, case.scale * x.state, log_decay, reverse=reverse, add=add)
        expected = exact + wide.do if add else exact
        assert_close(o[:, is_read], expected[:, is_read])


NOT_FINITE = [
    *[("q", value) for value in (0.0, float("nan"))],
    *[(name, value) for name in ("k", "v", "initial_state") for value in (0.0, float("inf"), float("nan"))],
]


@runs
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("name", "value"), NOT_FINITE, ids=str)
def test_zero_infinity_and_nan_survive_scaling(backend, device, name, value):
    """Scaling turns neither zero nor infinity into NaN, nor NaN into a number."""
    ordinary = make_inputs(Case(B=1, T=1, H=1), FP16)
    inputs = replace(ordinary, **{key: getattr(ordinary, key).abs() for key in ("q", "k", "v", "initial_state")})
    getattr(inputs, name)[...] = value
    wide, x = inputs.to(FP64), inputs.on(device)
    exact, _ = definition(*wide.qkv, wide.log_decay, **wide.options())
    o = lightning_attention(*x.qkv, x.log_decay, backend=backend, **x.options()).output
    torch.testing.assert_close(o.cpu(), exact.to(FP16), rtol=4 * EPS, atol=0, equal_nan=True)
