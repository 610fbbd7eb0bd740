"""Hopper kernels on a Hopper GPU, or emulated: results, and no deadlock of partitions."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import (
    INTERPRETED,
    Case,
    assert_accurate,
    assert_segments_remember_the_past,
    attention,
    device_of,
    make_inputs,
    run,
)

triton = pytest.importorskip("triton", "3.6")

from ops.gluon_emulator import emulated  # noqa: E402

from lightning_attention import lightning_attention  # noqa: E402
from lightning_attention.ops import hopper  # noqa: E402
from lightning_attention.ops.backends import BACKENDS  # noqa: E402
from lightning_attention.ops.calls import call  # noqa: E402
from lightning_attention.ops.gpu.plan import Plan  # noqa: E402
from lightning_attention.ops.gpu.segments import Segments, ceil_div  # noqa: E402
from lightning_attention.ops.hopper import config, gradients, kernels, launch, states  # noqa: E402
from lightning_attention.ops.inputs import AttentionInputs, GradientInputs  # noqa: E402
from lightning_attention.ops.problem import Problem  # noqa: E402

pytestmark = pytest.mark.triton

CASES = [
    Case(T=64, K=64, V=64),
    Case(T=200, K=64, V=64, H=3, scale=0.5),
    Case(T=130, K=128, V=128, H=2, B=1),
    Case(T=100, K=64, V=128, B=1, H=1),
    Case(T=100, K=128, V=64, B=1, H=1),
    Case(T=128, K=128, V=128, H=1, B=2, slope=None, state=False),
    Case(T=70, K=128, V=128, H=1, B=1, slope=100.0),
    Case(lengths=(3, 0, 64, 70, 1), K=128, V=128, H=1, slope=0.1),
    Case(lengths=(0, 65, 0, 128, 7), K=64, V=64, H=3, slope=0.1),
    Case(T=0, K=64, V=64),
]


@pytest.fixture
def kernels_run(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(BACKENDS["hopper"], "unsupported_reasons", lambda problem: [])
        monkeypatch.setattr(launch, "kernels", emulated(kernels))
        monkeypatch.setattr(launch, "gradients", emulated(gradients))
        monkeypatch.setattr(launch, "states", emulated(states))
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def cut(monkeypatch, num_segments: int, *, is_accumulated: bool = False, num_uncut: int = 0) -> None:
    """Cut batch rows into `num_segments`; a kernel accumulates their states, or each program sums them.

    The first `num_uncut` heads of all batch rows are not cut, but the last one always is.
    """

    def segments(self) -> Segments:
        whole = min(num_uncut, max(self.B * self.H - 1, 0))
        if num_segments == 2 and self.T > config.C:
            return replace(config.two_segments(self.T, self.mean_sequence_length), num_uncut=whole)
        length = max(ceil_div(self.T, num_segments * config.C), 1) * config.C
        return Segments(length, length, max(ceil_div(self.T, length), 1), whole)

    monkeypatch.setattr(launch.Scans, "cut", segments)
    monkeypatch.setattr(config, "MAX_SUMMED", 0 if is_accumulated else 100)


@pytest.mark.parametrize(
    ("num_segments", "is_accumulated"),
    [(1, False), (2, False), (3, False), (3, True)],
    ids=["1", "2", "3", "3-accumulated"],
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_segments_match_the_reference(kernels_run, monkeypatch, case, num_segments, is_accumulated):
    cut(monkeypatch, num_segments, is_accumulated=is_accumulated)
    inputs = make_inputs(case, torch.bfloat16).on(device_of("triton"))
    assert_accurate(run(attention("hopper"), inputs), inputs)


@pytest.mark.parametrize(
    ("num_segments", "is_accumulated"), [(2, False), (3, False), (3, True)], ids=["2", "3", "3-accumulated"]
)
@pytest.mark.parametrize("num_uncut", [1, 2, 4])
@pytest.mark.parametrize("case", [case for case in CASES if case.B * case.H > 1 and case.T != 0], ids=str)
def test_whole_heads_and_segments_match_the_reference(
    kernels_run, monkeypatch, case, num_uncut, num_segments, is_accumulated
):
    cut(monkeypatch, num_segments, is_accumulated=is_accumulated, num_uncut=num_uncut)
    inputs = make_inputs(case, torch.bfloat16).on(device_of("triton"))
    assert_accurate(run(attention("hopper"), inputs), inputs)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU compiles anew for many shapes; test_triton_gpu.py has some")
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(
        Case,
        B=st.integers(1, 2),
        T=st.integers(0, 500),
        H=st.integers(1, 2),
        K=st.sampled_from(config.HEAD_DIMS),
        V=st.sampled_from(config.HEAD_DIMS),
        lengths=st.none() | st.lists(st.integers(0, 200), min_size=1, max_size=4).map(tuple),
        slope=st.sampled_from([None, 1e-3, 0.5, 200.0]),
        scale=st.sampled_from([1.0, 0.1]),
        state=st.booleans(),
    ),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 3),
)
def test_any_shape_and_cut(kernels_run, case, num_segments, is_accumulated, num_uncut):
    """Sequences are long enough that stages of shared memory are reused."""
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, num_segments, is_accumulated=is_accumulated, num_uncut=num_uncut)
        inputs = make_inputs(case, torch.bfloat16).on(device_of("triton"))
        assert_accurate(run(attention("hopper"), inputs), inputs, is_long=True)


@pytest.mark.parametrize(("num_segments", "is_accumulated"), [(2, False), (3, False), (3, True)])
def test_segments_remember_the_past(kernels_run, monkeypatch, num_segments, is_accumulated):
    cut(monkeypatch, num_segments, is_accumulated=is_accumulated)
    assert_segments_remember_the_past(attention("hopper"), device_of("triton"), start=256, dtype=torch.bfloat16)


@pytest.mark.parametrize("num_segments", [1, 2, 3])
@pytest.mark.parametrize("case", [Case(B=1, T=70, H=3, K=64, V=64), Case(B=1, T=70, H=2, K=128, V=128)], ids=str)
def test_nothing_outside_a_sequence_is_read(kernels_run, monkeypatch, case, num_segments):
    """Memory around the tensors is NaN, and so is one of the packed sequences."""
    cut(monkeypatch, num_segments)
    inputs = make_inputs(case, torch.bfloat16).on(device_of("triton"))
    expected = run(attention("hopper"), inputs)
    for name, value in run(attention("hopper"), inputs.amid_nan(margin=8)).items():
        assert torch.equal(value, expected[name]), name
    cu_seqlens = torch.tensor([0, 40, 50, 70], dtype=torch.int32, device=inputs.q.device)
    q, k, v = (x.clone() for x in (inputs.q, inputs.k, inputs.v))
    clean = lightning_attention(q, k, v, inputs.log_decay, cu_seqlens=cu_seqlens, backend="hopper").output
    for x in (q, k, v):
        x[:, 40:50] = float("nan")
    o = lightning_attention(q, k, v, inputs.log_decay, cu_seqlens=cu_seqlens, backend="hopper").output
    for tokens in (slice(40), slice(50, None)):
        assert torch.equal(o[:, tokens], clean[:, tokens])


@pytest.mark.parametrize("is_accumulated", [False, True], ids=["summed", "accumulated"])
@pytest.mark.parametrize("V", [64, 128])
def test_the_first_launch_of_a_call_waits_for_the_previous_kernel(kernels_run, monkeypatch, V, is_accumulated):
    """Later launches may overlap: a plan frees nothing before all are launched."""
    cut(monkeypatch, 3, is_accumulated=is_accumulated)
    run, overlaps = Plan.run, []

    def checked(plan: Plan, inputs: tuple) -> list:
        overlaps.append([launch.options.get("launch_pdl", False) for launch in plan.launches])
        return run(plan, inputs)

    monkeypatch.setattr(Plan, "run", checked)
    x = make_inputs(Case(B=1, T=180, H=2, K=64, V=V), torch.bfloat16).on(device_of("triton"))
    read = *x.qkv, x.log_decay, x.initial_state, None
    call(launch.forward, AttentionInputs(*read), 1.0, True)
    call(launch.backward, GradientInputs(*read, x.do, x.d_final_state), 1.0)
    assert [len(options) for options in overlaps] == [3, 6 + (V != 64)] if is_accumulated else [2, 4 + (V != 64)]
    assert not any(options[0] for options in overlaps)
    assert all(options[-1] for options in overlaps)


@pytest.mark.parametrize("case", [Case(B=0, K=64, V=64), Case(lengths=(), K=128, V=128)], ids=str)
def test_an_empty_batch_gives_empty_results(kernels_run, case):
    inputs = make_inputs(case, torch.bfloat16).on(device_of("triton"))
    o, state = attention("hopper")(inputs.q, inputs.k, inputs.v, inputs.log_decay, **inputs.options())
    assert o.shape == inputs.v.shape
    assert state.shape == inputs.d_final_state.shape


def segments(
    T: int, heads: int, D: int = 128, *, num_sequences: int = 1, on: str = "h200", **options: bool
) -> Segments:
    return config.segments(T, T // num_sequences, heads, D, D, 132, BYTES_PER_SECOND[on], **options)


# As `launch` computes it.
BYTES_PER_SECOND = {"h100": 2.88e12, "h200": 4.23e12}


@pytest.mark.parametrize("is_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("T", "heads"),
    [(1024, 64), (8192, 64), (8192, 44), (1 << 20, 1), (1 << 20, 16), (100, 3), (129, 1), (0, 4), (0, 140), (8192, 0)],
)
def test_segments_cover_a_batch_row(T, heads, is_backward):
    found = segments(T, heads, is_backward=is_backward)
    assert found.length == found.interval
    assert found.count == 1 or found.length % config.C == 0
    assert (found.count - 1) * found.length < max(T, 1) <= found.count * found.length


@pytest.mark.parametrize(("T", "sequence"), [(65, 65), (128, 128), (200, 10), (8192, 8192), (32768, 1638)])
def test_both_of_two_segments_have_tokens(T, sequence):
    found = config.two_segments(T, sequence)
    assert 0 < found.length < T
    assert found.length >= T // 2 - config.C


@pytest.mark.parametrize("is_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("D", "heads", "whole"), [(128, 136, 132), (128, 400, 396), (64, 272, 264), (64, 540, 528)])
def test_heads_that_do_not_fit_the_gpu_are_cut(D, heads, whole, is_backward):
    found = segments(8192, heads, D, is_backward=is_backward)
    assert found.num_uncut == whole
    assert 1 < found.count <= 132 * (128 // D) // (heads - whole)


@pytest.mark.parametrize("heads", [132, 256, 264])
def test_heads_that_fill_the_gpu_are_not_cut(heads):
    assert segments(8192, heads) == Segments(8192, 8192, 1)


def test_segments_fill_the_gpu():
    """A GPU that is full without segments gets none."""
    assert segments(1 << 20, 1).count > 100
    assert segments(1 << 20, 16).count == 8
    assert segments(1 << 20, 128).count == 1


@pytest.mark.parametrize(
    ("B", "T", "H", "D", "is_slow"),
    [(1, 128, 64, 128, True), (1, 1024, 64, 128, True), (1, 8192, 16, 128, False), (1, 1024, 8, 64, True)],
)
def test_small_forward_problems_prefer_the_portable_kernels(B, T, H, D, is_slow):
    problem = Problem(B, T, H, D, D, B, torch.bfloat16, torch.device("cuda"))
    assert hopper.is_slow(problem) == is_slow
    assert not hopper.is_slow(problem._replace(is_backward=True))


def test_two_segments_need_fast_memory():
    """Two segments read most of k and v twice: worth it on an H200, not on an H100."""
    assert [segments(8192, 64, on=name).count for name in ("h200", "h100")] == [2, 1]


def test_packed_sequences_are_cut_at_little_cost():
    """A segment reads the previous one only as far back as its own sequence."""
    counts = [segments(8192, 64, num_sequences=n, on="h100").count for n in (1, 20)]
    assert counts == [1, 2]
