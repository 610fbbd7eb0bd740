"""The Triton kernels, beyond the guarantees of all backends (test_attention.py): segments, ranges and refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    INTERPRETED,
    Case,
    assert_accurate,
    assert_segments_remember_the_past,
    attention,
    device_of,
    error,
    make_inputs,
    run,
)

from lightning_attention import lightning_attention
from lightning_attention.distributed.states import write_state
from lightning_attention.ops import triton as backend
from lightning_attention.ops.calls import call
from lightning_attention.ops.gpu import product_precision
from lightning_attention.ops.gpu.segments import Segments, ceil_div
from lightning_attention.ops.inputs import GradientInputs
from lightning_attention.ops.problem import Problem
from lightning_attention.ops.triton import config

kernels_run = pytest.mark.triton
ATTENTION = attention("triton")


@pytest.fixture(params=[1, 3], ids=["one-interval", "three-intervals"])
def intervals(request):
    return request.param


@pytest.fixture(params=[0, 100], ids=["accumulated", "summed"])
def segments(monkeypatch, request, intervals):
    """Cut batch rows into segments of 64 or 192 tokens, each of one or three intervals."""
    monkeypatch.setattr(config, "MAX_SUMMED", request.param)

    def cut(length: int, *_: int) -> Segments:
        count = ceil_div(length, 64 * intervals)
        return Segments(64 * intervals, 64, count) if count > 1 else Segments(max(length, 1), 1, 1)

    monkeypatch.setattr(config, "segments", cut)


SEGMENTED = [
    Case(B=1, T=600, H=2),
    Case(B=2, T=577, H=1, K=16, V=40, slope=None),
    Case(B=1, T=450, H=2, slope=100.0),
    Case(B=1, T=450, H=2, slope=1e-3, scale=0.2, state=False),
    # Sequences end inside of a segment, at its end and at the end of an interval; they span several, or are empty.
    Case(lengths=(0, 100, 28, 64, 0, 0, 200, 1, 63, 0, 144, 0), H=2, slope=0.1),
    Case(lengths=(600,), H=2, slope=0.01),
    Case(lengths=(1,) * 70, H=1, K=16, V=16),
]


@kernels_run
@pytest.mark.parametrize("case", SEGMENTED, ids=str)
def test_segments_match_the_definition(segments, case):
    inputs = make_inputs(case, torch.float32).on(device_of("triton"))
    assert_accurate(run(ATTENTION, inputs), inputs)


@kernels_run
def test_nothing_outside_of_the_inputs_is_read(segments):
    inputs = make_inputs(Case(B=1, T=333, H=2, K=24, V=20), torch.float32).on(device_of("triton"))
    expected = run(ATTENTION, inputs)
    for name, value in run(ATTENTION, inputs.amid_nan()).items():
        assert torch.equal(value, expected[name]), name


@kernels_run
def test_segments_remember_the_past(segments):
    assert_segments_remember_the_past(ATTENTION, device_of("triton"), start=192)


@kernels_run
def test_forward_and_reverse_states_share_a_buffer(segments, monkeypatch):
    from lightning_attention.ops.gpu.plan import Planner
    from lightning_attention.ops.triton import kernels, launch

    start, made = Planner.launch, []

    def launched(planner, kernel, programs, options, **arguments):
        if kernel is kernels.interval_state_kernel:
            made.append(arguments["interval_states"])
        start(planner, kernel, programs, options, **arguments)

    monkeypatch.setattr(Planner, "launch", launched)
    x = make_inputs(Case(B=1, T=600, H=2, K=16, V=16), torch.float32).on(device_of("triton"))
    call(launch.backward, GradientInputs(*x.qkv, x.log_decay, None, None, x.do, None), 1.0)
    assert len(made) == 2
    assert made[0] is made[1]


@kernels_run
@pytest.mark.parametrize("slope", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reverse"])
def test_written_states_are_accurate_after_a_short_interval(monkeypatch, reverse, slope):
    """Three intervals of 64 tokens and one of 8; slopes make heads remember several, one, or a part of one."""
    monkeypatch.setattr(config, "one_segment", lambda length, *_: Segments(256, 64, 2))
    x = make_inputs(Case(B=1, T=200, H=1, K=32, V=16), torch.float16).on(device_of("triton"))
    state = write_state("triton", x.k, x.v, torch.tensor([-slope], device=x.k.device), reverse=reverse)
    age = torch.arange(1, 201) if reverse else torch.arange(199, -1, -1)
    weights = torch.exp(-slope * age.double()).to(x.k.device)
    exact = torch.einsum("t,bthk,bthv->bhkv", weights, x.k.double(), x.v.double())
    assert error(state, exact) < torch.finfo(torch.float16).eps


@kernels_run
def test_states_of_float16_inputs_may_exceed_float16():
    """A small scale keeps outputs in the range of float16."""
    ones = torch.ones(1, 200, 1, 16, dtype=torch.float16, device=device_of("triton"))
    state = torch.full((1, 1, 16, 16), 1e7, device=ones.device)
    o, final_state = ATTENTION(ones, ones, ones, None, initial_state=state, scale=1e-6)
    t = torch.arange(1, 201, dtype=torch.float64, device=ones.device)
    exact = (1e-6 * 16 * (1e7 + t))[None, :, None, None].expand(o.shape)
    assert error(o, exact) < torch.finfo(torch.float16).eps
    assert error(final_state, torch.full(final_state.shape, 1e7 + 200.0, dtype=torch.float64)) < 1e-6


@kernels_run
def test_a_scale_of_zero_gives_zeros():
    inputs = make_inputs(Case(scale=0.0), torch.float32).on(device_of("triton"))
    result = run(ATTENTION, inputs)
    assert result["o"].abs().max() == 0
    assert_accurate(result, inputs)


PROBLEM = Problem(1, 100, 2, 64, 64, 1, torch.float32, torch.device("cpu"))
REFUSED = [
    ({"dtype": torch.float64}, "float64 has no tensor cores"),
    ({"dtype": torch.bfloat16}, "the interpreter has no bfloat16 products"),
    ({"key_dim": 257}, "head sizes must be 1 to 256, got K = 257 and V = 64"),
    ({"value_dim": 0}, "head sizes must be 1 to 256, got K = 64 and V = 0"),
    ({"is_tree": True}, "a tree must have at most 64 drafts, got 100"),
    ({"device": torch.device("meta")}, "it runs on GPUs, got meta"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_unsupported_problems_are_refused_with_reasons(change, reason):
    assert reason in backend.unsupported_reasons(PROBLEM._replace(**change))


def test_products_have_the_precision_set_in_pytorch():
    """PyTorch has two ways to set the precision, and can raise if one is read after the other was used."""
    matmul = torch.backends.cuda.matmul
    found = []
    for is_tf32 in (True, False):
        torch.set_float32_matmul_precision("high" if is_tf32 else "highest")
        found.append(product_precision(torch.float32))
    for setting in ("tf32", "ieee"):
        matmul.fp32_precision = setting
        found.append(product_precision(torch.float32))
    assert found == ["tf32", "ieee"] * 2
    assert product_precision(torch.bfloat16) == "ieee"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on a CPU")
def test_a_cpu_without_the_interpreter_is_refused():
    x = torch.randn(1, 3, 2, 16)
    with pytest.raises(NotImplementedError, match="backend 'triton' cannot run this: it runs on GPUs, got cpu"):
        lightning_attention(x, x, x, backend="triton")


@given(st.integers(0, 1 << 22), st.integers(0, 4096), st.integers(1, 200), st.integers(1, 2), st.integers(256, 4096))
def test_segments_cover_a_batch_row_and_fit_the_device(
    length, programs, multiprocessors, programs_per_sm, min_interval
):
    cut = config.segments(length, programs, multiprocessors, programs_per_sm, min_interval)
    assert (cut.count - 1) * cut.length < max(length, 1) <= cut.count * cut.length
    assert cut.length % cut.interval == 0
    if cut.count == 1:
        assert cut.num_intervals == 0
    else:
        assert programs * cut.count <= programs_per_sm * multiprocessors
        assert cut.interval % 64 == 0
        assert cut.interval == cut.length or cut.interval >= min_interval


@given(st.integers(0, 1 << 22), st.integers(0, 4096), st.integers(1, 200), st.integers(1, 2), st.integers(256, 4096))
def test_intervals_cover_a_batch_row_and_fit_the_device(
    length, programs, multiprocessors, programs_per_sm, min_interval
):
    cut = config.all_intervals(length, programs, multiprocessors, programs_per_sm, min_interval)
    count = cut.num_intervals
    assert (count - 1) * cut.interval < max(length, 1) <= cut.length == count * cut.interval
    assert cut.interval % 64 == 0
    if count > 1:
        assert programs * count <= programs_per_sm * multiprocessors
        assert cut.interval >= min_interval


SIZES = (1, 16, 40, 64, 96, 128, 192, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_interval_states_take_at_most_a_twentieth_of_the_inputs(dtype):
    for K in SIZES:
        for V in SIZES:
            inputs = config.min_interval(K, V, dtype) * (2 * K + V) * dtype.itemsize
            states = 4 * K * V
            assert states <= 0.05 * inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_tiles_cover_a_head_and_fit_registers(dtype, precision):
    for K in SIZES:
        for V in SIZES:
            for tiles in (config.scan_tiles, config.interval_tiles):
                cut = tiles(K, V, dtype, precision)
                assert cut.BK >= K
                assert min(cut.C, cut.BK, cut.BV) >= 16
            BK, BV = config.step_tiles(K, V)
            assert BK >= K
            assert BK * BV <= 4096
