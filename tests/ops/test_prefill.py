"""Prefill: attention over a prompt that also returns states at positions inside of the prompt."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BACKENDS, Case, attention, device_of, dtype_of, error, make_inputs

from lightning_attention import lightning_attention_prefill
from lightning_attention.ops.gpu.segments import Segments
from lightning_attention.ops.triton import config

CASES = [
    (Case(T=37), [1, 16, 36, 37]),
    (Case(T=300, H=1, slope=None, scale=0.5, state=False), [128, 200, 256]),
    (Case(T=20, K=5, V=7, slope=50.0), [11]),
    (Case(T=20), []),
    (Case(lengths=(0, 7, 0, 140, 1, 20, 0)), [3, 7, 8, 100, 147, 148, 149, 168]),
    (Case(lengths=(9,), state=False), [4, 9]),
    (Case(lengths=()), []),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "positions"), CASES, ids=[str(case) for case, _ in CASES])
def test_states_equal_final_states_of_prefixes(backend, case, positions):
    inputs = make_inputs(case, dtype_of(backend)).on(device_of(backend))
    exact = make_inputs(case)
    q, k, v = inputs.qkv
    given = torch.tensor(positions, dtype=torch.int32, device=q.device)
    o, final_state, states = lightning_attention_prefill(
        q, k, v, inputs.log_decay, state_positions=given, backend=backend, **inputs.options()
    )
    expected_o, expected_state = attention("chunked")(*exact.qkv, exact.log_decay, **exact.options())
    rounding = 16 * torch.finfo(q.dtype).eps
    assert error(o, expected_o) < rounding
    assert error(final_state, expected_state) < rounding
    assert states.shape == (q.shape[0], len(positions), *final_state.shape[1:])
    assert states.dtype == final_state.dtype
    bounds = [0, case.T] if exact.cu_seqlens is None else exact.cu_seqlens.tolist()
    for i, position in enumerate(positions):
        n, start = next((n, a) for n, (a, b) in enumerate(pairwise(bounds)) if a < position <= b)
        initial = exact.initial_state
        if initial is not None and case.lengths is not None:
            initial = initial[n : n + 1]
        q, k, v = (x[:, start:position] for x in exact.qkv)
        _, expected = attention("chunked")(q, k, v, exact.log_decay, initial_state=initial, scale=case.scale)
        assert error(states[:, i], expected) < rounding


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(1, 50)), st.integers(0, 1000))
def test_continuing_from_a_state_equals_one_call(positions, seed):
    inputs = make_inputs(Case(T=50), seed=seed)
    (q, k, v), positions = inputs.qkv, sorted(positions)
    expected_o, final_state, states = lightning_attention_prefill(
        q, k, v, inputs.log_decay, state_positions=positions, initial_state=inputs.state
    )
    for position, state in zip(positions, states.unbind(1), strict=True):
        o, after = attention()(q[:, position:], k[:, position:], v[:, position:], inputs.log_decay, initial_state=state)
        assert error(o, expected_o[:, position:]) < 1e-13
        assert error(after, final_state) < 1e-13


SEGMENTED = [
    (Case(B=2, T=200, H=1), [1, 63, 64, 65, 128, 199, 200]),
    (Case(lengths=(0, 100, 28, 0, 64, 8, 0), H=1, slope=0.1), [64, 100, 101, 127, 128, 192, 199]),
]


@pytest.mark.triton
@pytest.mark.parametrize(("case", "positions"), SEGMENTED, ids=[str(case) for case, _ in SEGMENTED])
def test_positions_in_segments_equal_reference(monkeypatch, case, positions):
    """Positions lie inside of segments of 64 tokens and at their ends, and cost no further launch."""
    monkeypatch.setattr(config, "segments", lambda *_: Segments(64, 64, 4))
    inputs = make_inputs(case, torch.float32).on(device_of("triton"))
    exact = make_inputs(case)
    launches = count_launches(monkeypatch)
    arguments = *inputs.qkv, inputs.log_decay
    o, final_state, states = lightning_attention_prefill(
        *arguments, state_positions=positions, backend="triton", **inputs.options()
    )
    assert len(launches) == 2  # interval states, and the scan
    expected = lightning_attention_prefill(
        *exact.qkv, exact.log_decay, state_positions=positions, backend="reference", **exact.options()
    )
    for x, y in zip((o, final_state, states), expected, strict=True):
        assert error(x, y) < 2e-6


def count_launches(monkeypatch) -> list[int]:
    from lightning_attention.ops.gpu.plan import Planner

    launches, launch = [], Planner.launch

    def counted(planner, kernel, programs, options, **arguments):
        launches.append(programs)
        launch(planner, kernel, programs, options, **arguments)

    monkeypatch.setattr(Planner, "launch", counted)
    return launches


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_equals_eager():
    inputs = make_inputs(Case(T=20), torch.float32)

    def prefill(q, k, v, log_decay, positions):
        o, final_state, states = lightning_attention_prefill(q, k, v, log_decay, state_positions=positions)
        return o + 1, final_state * 2, states * 3

    compiled = torch.compile(prefill, fullgraph=True, backend="aot_eager")
    for positions in (torch.tensor([3, 11]), [3, 11]):
        arguments = *inputs.qkv, inputs.log_decay, positions
        for x, y in zip(compiled(*arguments), prefill(*arguments), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["list", "tensor"])
@pytest.mark.parametrize("positions", [[0], [3, 3], [4, 2], [11], [-1]], ids=str)
def test_positions_must_rise_and_be_in_range(positions, kind):
    x = torch.zeros(1, 10, 1, 4)
    with pytest.raises(ValueError, match="state_positions must rise from 1 to at most T = 10"):
        lightning_attention_prefill(x, x, x, state_positions=kind(positions))


REFUSED = [
    (torch.tensor([[3]]), ValueError, r"state_positions must be \[M\], got shape \(1, 1\)"),
    (torch.tensor([3.0]), TypeError, "state_positions must be int32 or int64, got torch.float32"),
    (torch.empty(1, dtype=torch.int64, device="meta"), ValueError, "state_positions must be on the device of q, cpu"),
]


@pytest.mark.parametrize(("positions", "kind", "message"), REFUSED, ids=["shape", "dtype", "device"])
def test_positions_of_wrong_shape_dtype_or_device_are_refused(positions, kind, message):
    x = torch.zeros(1, 10, 1, 4)
    with pytest.raises(kind, match=message):
        lightning_attention_prefill(x, x, x, state_positions=positions)


def test_gradients_are_refused():
    x = torch.zeros(1, 10, 1, 4, requires_grad=True)
    with pytest.raises(ValueError, match="lightning_attention_prefill keeps no gradient"):
        lightning_attention_prefill(x, x, x, state_positions=[3])


@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["list", "tensor"])
def test_autocast_casts_q_k_and_v(kind):
    q = torch.randn(1, 10, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = lightning_attention_prefill(q.bfloat16(), q, q, state_positions=kind([5]))
    expected = lightning_attention_prefill(q.bfloat16(), q.bfloat16(), q.bfloat16(), state_positions=[5])
    torch.testing.assert_close(found, expected)
