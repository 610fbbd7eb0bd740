"""The kernels on a GPU: real sizes, memory, CUDA graphs and compilation."""

import os
import shutil
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, assert_accurate, assert_state_is_float32_between_chunks, attention, error, make_inputs, run

from lightning_attention import (
    DecodingState,
    decay,
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_prefill,
    lightning_attention_prefill_,
    lightning_attention_step,
    lightning_attention_verify,
)
from lightning_attention.distributed.states import read_state_, write_state
from lightning_attention.ops.backends import BACKENDS as ALL_BACKENDS
from lightning_attention.ops.calls import call as prepared
from lightning_attention.ops.inputs import AttentionInputs, GradientInputs
from lightning_attention.ops.problem import Problem
from lightning_attention.ops.triton import config

pytestmark = pytest.mark.gpu

is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
BACKENDS = (
    "triton",
    pytest.param("hopper", marks=pytest.mark.skipif(not is_hopper, reason="needs a Hopper GPU")),
)
on_backends = pytest.mark.parametrize("backend", BACKENDS)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def skip_if_unsupported(backend: str, K: int, V: int, dtype: torch.dtype = BF16) -> None:
    if backend == "hopper" and (dtype != BF16 or not {K, V} <= {64, 128}):
        pytest.skip("the Hopper kernels do not support it")


LONG = [
    (Case(B=1, T=9001, H=2, K=128, V=128, slope=0.01), BF16),
    (Case(B=1, T=9001, H=2, K=128, V=128, slope=100.0), BF16),
    (Case(B=1, T=8191, H=3, K=64, V=64, slope=None, state=False), BF16),
    (Case(B=2, T=4100, H=2, K=128, V=64, slope=0.1, scale=0.1), BF16),
    (Case(B=1, T=9001, H=2, K=128, V=128, slope=0.01), FP16),
    (Case(lengths=(0, 1, 4095, 0, 2049, 63, 3000, 1, 0), H=2, K=64, V=64, slope=0.02), FP16),
    (Case(B=1, T=5000, H=2, K=96, V=40, slope=0.001), FP16),
    (Case(B=1, T=9000, H=1, K=256, V=256, slope=0.1), BF16),
    (Case(B=1, T=4500, H=1, K=192, V=80, slope=8.0), BF16),
    (Case(B=1, T=4500, H=3, K=64, V=64, slope=0.5), FP32),
    (Case(B=1, T=4500, H=1, K=256, V=256, slope=0.5), FP32),
    (Case(lengths=(0, 1, 4095, 0, 2049, 63, 3000, 1, 0), H=2, K=128, V=128, slope=0.02), BF16),
    (Case(lengths=(8192,), H=2, K=64, V=64, slope=0.02), BF16),
    (Case(lengths=(1,) * 300 + (6000,), H=2, K=32, V=32, slope=0.02), BF16),
    # Cut into two segments on a GPU of about 130 multiprocessors.
    (Case(B=2, T=1500, H=24, K=128, V=128, slope=0.01), BF16),
    (Case(lengths=(700, 40, 0, 900), H=100, K=64, V=64, slope=None), BF16),
]


@on_backends
@pytest.mark.parametrize(("case", "dtype"), LONG, ids=[f"{case},{dtype}" for case, dtype in LONG])
def test_long_sequences_are_accurate(backend, case, dtype):
    """Sequences are long enough to be cut into segments."""
    skip_if_unsupported(backend, case.K, case.V, dtype)
    inputs = make_inputs(case, dtype).on("cuda")
    assert_accurate(run(attention(backend), inputs), inputs, is_long=True)


@on_backends
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_state_is_float32_between_chunks(backend, dtype):
    """There are so many heads that no sequence is cut into segments."""
    skip_if_unsupported(backend, 64, 64, dtype)
    assert_state_is_float32_between_chunks(
        backend, Case(B=1, T=2048, H=300, K=64, V=64, slope=1e-4, state=False), dtype
    )


@on_backends
@pytest.mark.parametrize(("K", "V"), [(16, 16), (48, 80), (64, 64), (64, 128), (128, 64), (128, 128)])
@settings(max_examples=250, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(0, 700),
    st.integers(1, 3),
    st.none() | st.lists(st.integers(0, 300), min_size=1, max_size=5).map(tuple),
    st.sampled_from([1e-3, 0.5, 3.0, 200.0]),
    st.integers(0, 1 << 30),
)
def test_any_shape_is_accurate(backend, K, V, B, T, H, lengths, slope, seed):
    skip_if_unsupported(backend, K, V)
    inputs = make_inputs(Case(B, T, H, K, V, lengths, slope), BF16, seed).on("cuda")
    assert_accurate(run(attention(backend), inputs), inputs, is_long=True)


@pytest.mark.skipif(not is_hopper, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_hopper_refuses_other_dtypes_than_bfloat16(dtype):
    """float16 is refused because of its range."""
    x = torch.randn(1, 64, 1, 64, device="cuda", dtype=dtype)
    reason = {FP16: "float16 scores and states could overflow here", FP32: "q, k and v must be bfloat16, got"}[dtype]
    with pytest.raises(NotImplementedError, match=reason):
        lightning_attention(x, x, x, backend="hopper")


def set_in_general(is_tf32: bool) -> None:
    torch.set_float32_matmul_precision("high" if is_tf32 else "highest")


def set_for_cuda(is_tf32: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if is_tf32 else "ieee"


@pytest.mark.parametrize("set_tf32", [set_in_general, set_for_cuda])
def test_float32_products_follow_the_tf32_setting(set_tf32):
    """Products have 10 bits of mantissa with TF32, otherwise 23."""
    inputs = make_inputs(Case(T=300, H=2, K=64, V=128), FP32).on("cuda")
    exact = run(attention("chunked"), inputs.to(torch.float64))
    before = run(attention("triton"), inputs)
    set_tf32(True)
    try:
        rounded = run(attention("triton"), inputs)
    finally:
        set_tf32(False)
    after = run(attention("triton"), inputs)
    for name, value in rounded.items():
        assert 1e-5 < error(value, exact[name]) < 2e-3, name
        assert error(before[name], exact[name]) < 1e-6, name
        assert error(after[name], exact[name]) < 1e-6, name


def large(
    B: int, T: int, H: int, D: int, dtype: torch.dtype = BF16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v and do."""
    q, k, v, do = (torch.randn(B, T, H, D, device="cuda", dtype=BF16).to(dtype) for _ in range(4))
    return q, k, v, do


def differentiated(backend, q, k, v, do, log_decay, **options) -> list[torch.Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o, _ = lightning_attention(q, k, v, log_decay, backend=backend, **options)
    return [o.detach(), *torch.autograd.grad(o, [q, k, v], do)]


@pytest.mark.large
@on_backends
def test_ends_of_more_than_two_to_the_31_elements_equal_short_calls(backend):
    """Heads with a slope of 1 forget within 200 tokens, so short calls on the last or first tokens agree."""
    T, H, D, n = 1_100_000, 16, 128, 4096
    assert T * H * D > 1 << 31
    q, k, v, do = large(1, T, H, D)
    log_decay = torch.full((H,), -1.0, device="cuda")
    results = differentiated(backend, q, k, v, do, log_decay)
    for at, unaffected in ((slice(T - n, T), slice(300, n)), (slice(0, n), slice(0, n - 300))):
        short = differentiated(backend, q[:, at], k[:, at], v[:, at], do[:, at], log_decay)
        for x, y in zip(results, short, strict=True):
            assert error(x[:, at][:, unaffected], y[:, unaffected].double()) < 4e-3


@pytest.mark.large
def test_states_of_more_than_two_to_the_31_elements():
    """States depend on the first or last tokens alone, and reads of a state change only these."""
    T, H, D, n = 1_100_000, 16, 128, 4096
    q, k, _, _ = large(1, T, H, D)
    log_decay = torch.full((H,), -1.0, device="cuda")
    for reverse in (False, True):
        written, read = (slice(0, n), slice(T - n, T)) if reverse else (slice(T - n, T), slice(0, n))
        state = write_state("triton", q, k, log_decay, reverse=reverse)
        expected = write_state("triton", q[:, written], k[:, written], log_decay, reverse=reverse)
        assert error(state, expected.double()) < 4e-3
        o, short = torch.empty_like(q), torch.empty_like(q[:, read])
        read_state_("triton", o, q, state, log_decay, reverse=reverse, add=False)
        read_state_("triton", short, q[:, read], state, log_decay, reverse=reverse, add=False)
        assert error(o[:, read], short.double()) < 4e-3
        assert not o[:, : read.start].any()
        assert not o[:, read.stop :].any()
        added = k.clone()
        read_state_("triton", added, q, state, log_decay, reverse=reverse, add=True)
        assert torch.equal(added[:, : read.start], k[:, : read.start])
        assert torch.equal(added[:, read.stop :], k[:, read.stop :])
        assert error(added[:, read], k[:, read].double() + short.double()) < 4e-3


@pytest.mark.large
@on_backends
def test_slots_beyond_two_to_the_31_elements_are_found(backend):
    N, H, D, T = 2100, 64, 128, 70
    q, k, v, _ = large(2, T, H, D)
    state = DecodingState.zeros(N, H, D, D, dtype=BF16, device="cuda", backend=backend)
    assert state.state.numel() > 1 << 31
    slots = torch.tensor([N - 1, 1], device="cuda")
    outputs = [
        lightning_attention_prefill_(
            q[:, :60], k[:, :60], v[:, :60], state=state, state_indices=slots, backend=backend, invariant=True
        )
    ]
    for t in range(60, T):
        token = (x[:, t] for x in (q, k, v))
        o = lightning_attention_step(*token, state=state, state_indices=slots, backend=backend)
        outputs.append(o.unsqueeze(1))
    expected = lightning_attention(q, k, v, backend=backend, invariant=True).output
    assert torch.equal(torch.cat(outputs, dim=1), expected)
    state.fold_(indices=slots)
    kept = state.select(slots).state
    state.state[slots], state.count[slots] = 0, 0
    assert kept.any()
    assert not any(part.any() for part in state[::3])


def test_states_between_slices_take_little_memory():
    """Writing a state takes little memory besides the state; reading takes none."""
    q, k, o, _ = large(1, 65536, 16, 128)
    log_decay = decay.log_decay(16, preset="alibi").cuda()
    state = write_state("triton", q, k, log_decay, reverse=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    read_state_("triton", o, q, state, log_decay, reverse=False, add=True)
    assert torch.cuda.max_memory_allocated() == before
    write_state("triton", q, k, log_decay, reverse=True)
    assert torch.cuda.max_memory_allocated() - before <= 0.05 * (q.nbytes + k.nbytes)


@on_backends
def test_repeated_calls_are_bit_identical(backend):
    """Kernels use no atomics, so results do not depend on the order of programs."""
    inputs, log_decay = large(1, 32768, 8, 128), decay.log_decay(8, preset="alibi").cuda()
    for x, y in zip(
        differentiated(backend, *inputs, log_decay), differentiated(backend, *inputs, log_decay), strict=True
    ):
        assert torch.equal(x, y)


@on_backends
def test_split_and_packed_equal_one_call(backend):
    attend = attention(backend)
    q, k, v, _ = large(1, 16384, 4, 128)
    log_decay = decay.log_decay(4, preset="alibi").cuda()
    o, state = attend(q, k, v, log_decay)
    carried, outputs = None, []
    for at in (slice(0, 5000), slice(5000, 5001), slice(5001, 16384)):
        output, carried = attend(q[:, at], k[:, at], v[:, at], log_decay, initial_state=carried)
        outputs.append(output)
    assert error(torch.cat(outputs, dim=1), o.double()) < 4e-3
    assert carried is not None
    assert error(carried, state.double()) < 4e-3
    bounds = [0, 5000, 5000, 9000, 16384]
    packed, _ = attend(q, k, v, log_decay, cu_seqlens=torch.tensor(bounds, device="cuda", dtype=torch.int32))
    separate = [attend(q[:, a:b], k[:, a:b], v[:, a:b], log_decay)[0] for a, b in pairwise(bounds)]
    assert error(packed, torch.cat(separate, dim=1).double()) < 4e-3


@on_backends
@pytest.mark.parametrize(
    "shape",
    [
        (1, 512, 16, 128),
        (1, 1024, 64, 128),
        (4, 8192, 32, 128),
        (1, 65536, 8, 128),
        (1, 65536, 8, 64),
        (1, 65536, 2, 256),
    ],
    ids=str,
)
def test_workspace_is_small(backend, shape):
    """Workspace is at most 5 % of the inputs, or for short inputs one state for each program that runs at once."""
    skip_if_unsupported(backend, shape[3], shape[3])
    launch = launch_of(backend)
    q, k, v, do = large(*shape)
    tiles = config.scan_tiles(shape[3], shape[3], BF16, "ieee")
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    states = multiprocessors * tiles.programs_per_sm * tiles.BK * tiles.BV * 4
    x = AttentionInputs(q, k, v, decay.log_decay(shape[2], preset="alibi").cuda(), None, None)
    for attend, inputs, results in (
        (lambda: prepared(launch.forward, x, 1.0, False), 3, 1),
        (lambda: prepared(launch.backward, GradientInputs(*x, do, None), 1.0), 4, 3),
    ):
        attend()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend()
        extra = torch.cuda.max_memory_allocated() - before - results * q.nbytes
        assert extra <= max(0.05 * inputs * q.nbytes, states)


@on_backends
def test_graph_replay_equals_eager(backend):
    inputs, log_decay = large(1, 9000, 4, 64), decay.log_decay(4, preset="alibi").cuda()
    cu_seqlens = torch.tensor([0, 3000, 3000, 9000], device="cuda", dtype=torch.int32)
    expected = differentiated(backend, *inputs, log_decay, cu_seqlens=cu_seqlens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = differentiated(backend, *inputs, log_decay, cu_seqlens=cu_seqlens)
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    for x, y in zip(captured, expected, strict=True):
        assert torch.equal(x, y)


def test_graph_replay_of_inference_equals_eager():
    """A prompt with states at positions, then a tree of drafts: nothing waits for the host."""
    q, k, v, _ = large(1, 9000, 4, 64)
    log_decay = decay.log_decay(4, preset="alibi").cuda()
    integers = {"device": "cuda", "dtype": torch.int32}
    positions, cu_seqlens = torch.tensor([64, 4000, 9000], **integers), torch.tensor([0, 3000, 9000], **integers)
    parents, last = torch.tensor([[-1, 0, 0, 2], [-1, -1, 1, 1]], **integers), torch.tensor([3, 0], **integers)
    draft_q, draft_k, draft_v = (x[0, :8].unflatten(0, (2, 4)) for x in (q, k, v))

    def infer() -> list[torch.Tensor]:
        outputs = lightning_attention_prefill(q, k, v, log_decay, state_positions=positions, cu_seqlens=cu_seqlens)
        state = outputs.final_state.clone()
        o = lightning_attention_verify(draft_q, draft_k, draft_v, log_decay, state=state, parents=parents)
        lightning_attention_commit(draft_k, draft_v, log_decay, state=state, last=last, parents=parents)
        return [*outputs, o, state]

    expected = infer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = infer()
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    for x, y in zip(captured, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("B", "T", "H"), [(2, 500, 4), (1, 4096, 40)], ids=["portable", "hopper"])
@pytest.mark.parametrize("output_final_state", [False, True], ids=["output", "state"])
def test_compiled_gradients_equal_eager(B, T, H, output_final_state):
    """On a Hopper GPU the larger problem takes the Hopper kernels by default."""
    inputs, log_decay = large(B, T, H, 64), decay.log_decay(H, preset="alibi").cuda()

    def loss(q, k, v, do):
        o, state = lightning_attention(q * 2, k, v, log_decay, output_final_state=output_final_state)
        assert (state is not None) == output_final_state
        return ((o + 1) * do).sum() + (0 if state is None else state.sum())

    gradients = []
    for call in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        gradients.append(torch.autograd.grad(call(*leaves), leaves))
    for x, y in zip(*gradients, strict=True):
        assert error(x, y.double()) < 1e-2


def kernels_of(backend):
    return import_module(f"lightning_attention.ops.{backend}.kernels")


def launch_of(backend):
    return import_module(f"lightning_attention.ops.{backend}.launch")


@on_backends
def test_all_lengths_share_compiled_code(backend):
    log_decay = decay.log_decay(4, preset="alibi").cuda()
    found = []
    for T in (64, 100, 9000, 1, 1000, 8192, 63, 20_000):
        differentiated(backend, *large(1, T, 4, 64), log_decay)
        found.append(len(kernels_of(backend).scan_kernel.device_caches[torch.cuda.current_device()][0]))
        if T == 9000:
            found = found[-1:]  # so far calls of one, two and many segments
    assert len(set(found)) == 1


def first_backend(problem: Problem) -> str:
    """Return the documented choice: the first backend that can run the problem and is not slow."""
    return next(
        name
        for name, backend in ALL_BACKENDS.items()
        if not backend.unsupported_reasons(problem) and not backend.is_slow(problem)
    )


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("T", "H", "D"), [(100, 2, 64), (1024, 64, 128), (4096, 64, 128), (4096, 64, 32)])
def test_auto_takes_the_first_suitable_backend(T, H, D, dtype):
    """Results are bit-identical to those of that backend; forward and backward are chosen separately."""
    q, k, v, do = large(1, T, H, D, dtype)
    problem = Problem.of_attention(AttentionInputs(q, k, v, None, None, None))
    forward, backward = (first_backend(problem._replace(is_backward=is_backward)) for is_backward in (False, True))
    o, *gradients = differentiated("auto", q, k, v, do, None)
    assert torch.equal(o, differentiated(forward, q, k, v, do, None)[0])
    for x, y in zip(gradients, differentiated(backward, q, k, v, do, None)[1:], strict=True):
        assert torch.equal(x, y)
    if dtype != BF16:
        assert forward == backward == "triton"


def test_steps_reach_slots_past_32_bit_offsets():
    H, D, slots = 64, 128, 2200
    pool = torch.empty(slots, H, D, D, device="cuda")
    assert (slots - 1) * pool.stride(0) > 1 << 31
    pool[-1].normal_()
    before, indices = pool[-1:].clone(), torch.tensor([slots - 1, -1], device="cuda")
    q, k, v, _ = (x[:, 0] for x in large(2, 1, H, D))
    log_decay = decay.log_decay(H, preset="alibi").cuda()
    o = lightning_attention_step(q, k, v, log_decay, state=pool, state_indices=indices, backend="triton")
    expected = lightning_attention_step(q[:1], k[:1], v[:1], log_decay, state=before, backend="chunked")
    assert error(o[:1], expected.double()) < 4e-3
    assert error(pool[-1:], before.double()) < 1e-6
    assert o[1].abs().max() == 0


@on_backends
def test_strided_inputs_are_not_copied(backend):
    """Views of one projection, and head-first tensors."""
    x = torch.randn(2, 3000, 3, 4, 64, device="cuda", dtype=BF16)
    launch = launch_of(backend)
    y = [torch.randn(2, 4, 3000, 64, device="cuda", dtype=BF16).transpose(1, 2) for _ in range(3)]
    for q, k, v in (x.unbind(2), y):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (o,) = prepared(launch.forward, AttentionInputs(q, k, v, None, None, None), 1.0, False)
        # The output and interval states; a copy of an input would exceed this.
        assert torch.cuda.max_memory_allocated() - before < 2 * o.nbytes
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (expected,) = prepared(launch.forward, AttentionInputs(q, k, v, None, None, None), 1.0, False)
        assert torch.equal(o, expected)


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    ("file", "tests"),
    [
        ("test_triton.py", "test_segments_match and three"),
        ("test_hopper.py", "test_segments_match and (lengths or 200 or 130) or test_nothing"),
        ("test_determinism.py", "(slots or scale or steps_alone) and triton-float16"),
    ],
    ids=["triton", "hopper", "decoding states"],
)
def test_memory_is_not_touched_out_of_bounds(file, tests):
    """compute-sanitizer's memcheck finds no errors, with a separate allocation for every tensor."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    options = ["-q", "-m", "triton", "-k", tests, "-p", "no:cacheprovider", "-p", "no:benchmark"]
    command = [sys.executable, "-m", "pytest", Path(__file__).parent / file, *options]
    found = subprocess.run(
        [sanitizer, "--tool", "memcheck", "--error-exitcode", "7", *command],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    if "Device not supported" in found.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert found.returncode == 0, found.stdout[-3000:]
    assert "ERROR SUMMARY: 0 errors" in found.stdout
    assert " passed" in found.stdout
