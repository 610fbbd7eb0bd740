"""Features of PyTorch: opcheck, compile, fake tensors and autocast; and imports without extras."""

import subprocess
import sys

import pytest
import torch
from oracle import BACKENDS, Case, device_of, dtype_of, make_inputs, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_attention import lightning_attention, lightning_attention_step

CASES = [Case(T=20, K=4, V=6), Case(lengths=(7, 0, 13), K=4, V=6)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore")
def test_attention_passes_opcheck(backend, case):
    inputs = make_inputs(case, dtype_of(backend)).on(device_of(backend))
    for log_decay, state in ((inputs.log_decay, inputs.state), (None, None)):
        read = (*inputs.qkv, log_decay, state, inputs.cu_seqlens)
        for output_final_state in (True, False):
            arguments = (*read, 0.5, output_final_state, backend)
            torch.library.opcheck(torch.ops.lightning_attention.forward.default, arguments)
        for d_final_state in (inputs.d_final_state, None):
            arguments = (*read, inputs.do, d_final_state, 0.5, backend)
            torch.library.opcheck(torch.ops.lightning_attention.backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("indices", [None, torch.tensor([1, -1])], ids=["all", "slots"])
@pytest.mark.parametrize("has_length", [True, False], ids=["BTHD", "BHD"])
@pytest.mark.filterwarnings("ignore")
def test_steps_pass_opcheck(backend, indices, has_length):
    inputs = make_inputs(Case(T=1), dtype_of(backend)).on(device_of(backend))
    indices = None if indices is None else indices.to(device_of(backend))
    qkv = (x if has_length else x[:, 0] for x in inputs.qkv)
    arguments = (*qkv, inputs.log_decay, inputs.state, indices, 1.0, backend)
    torch.library.opcheck(torch.ops.lightning_attention.step.default, arguments)
    saved = torch.tensor([[0], [-1]] if has_length else [0, -1], device=inputs.state.device)
    torch.library.opcheck(torch.ops.lightning_attention.step.default, (*arguments, saved))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parents", [None, torch.tensor([[-1, 0, 0], [-1, -1, 1]])], ids=["chain", "tree"])
@pytest.mark.filterwarnings("ignore")
def test_drafts_pass_opcheck(backend, parents):
    device = device_of(backend)
    inputs = make_inputs(Case(T=3), dtype_of(backend)).on(device)
    parents = None if parents is None else parents.to(device)
    indices, last = torch.tensor([1, -1], device=device), torch.tensor([2, 0], device=device)
    read = (*inputs.qkv, inputs.log_decay, inputs.state, indices, parents)
    torch.library.opcheck(torch.ops.lightning_attention.verify.default, (*read, 0.5, backend))
    torch.library.opcheck(torch.ops.lightning_attention.commit.default, (*read, last, backend))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore")
def test_prefill_passes_opcheck(backend, case):
    inputs = make_inputs(case, dtype_of(backend)).on(device_of(backend))
    for positions in (torch.tensor(x, dtype=torch.int64, device=inputs.q.device) for x in ([], [3, 20])):
        arguments = (*inputs.qkv, inputs.log_decay, inputs.state, inputs.cu_seqlens, positions, 0.5, backend)
        torch.library.opcheck(torch.ops.lightning_attention.prefill.default, arguments)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_equals_eager(case, dynamic):
    inputs = make_inputs(case, torch.float32)

    def attention(q, k, v, log_decay, **options):
        o, state = lightning_attention(q * 1.5, k, v, log_decay, output_final_state=True, **options)
        assert state is not None
        return o + 1, state * 2

    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected = run(attention, inputs)
    for name, value in run(compiled, inputs).items():
        torch.testing.assert_close(value, expected[name])


def test_compiled_gradients_equal_eager_without_final_state():
    """The compiler passes a gradient of zeros for the final state, which is empty if not asked for."""
    inputs = make_inputs(Case(T=20, K=4, V=6, state=False), torch.float32)

    def loss(q, k, v):
        return (lightning_attention(q * 1.5, k, v, inputs.log_decay).output * inputs.do).sum()

    gradients = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().requires_grad_() for x in inputs.qkv]
        gradients.append(torch.autograd.grad(call(*leaves), leaves))
    torch.testing.assert_close(*gradients)


def test_compiled_step_equals_eager():
    inputs = make_inputs(Case(T=1), torch.float32)
    q, k, v = inputs.q[:, 0], inputs.k[:, 0], inputs.v[:, 0]
    states = [inputs.state.clone() for _ in range(2)]
    step = torch.compile(lightning_attention_step, fullgraph=True, backend="aot_eager")
    o = step(q, k, v, inputs.log_decay, state=states[0])
    torch.testing.assert_close(o, lightning_attention_step(q, k, v, inputs.log_decay, state=states[1]))
    torch.testing.assert_close(states[0], states[1])


class Operators(TorchDispatchMode):
    """A mode that records the names of operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore")
def test_modes_tracers_and_profilers_see_the_operator():
    inputs = make_inputs(Case(T=3), torch.float32)

    def attention(q):
        return lightning_attention(q, inputs.k, inputs.v, inputs.log_decay).output

    expected, name = attention(inputs.q), "lightning_attention::forward"
    with Operators() as operators:
        attention(inputs.q)
    assert operators.names == [name]
    for mode in ("real", "fake"):
        graph = make_fx(attention, tracing_mode=mode, _allow_non_fake_inputs=True)(inputs.q)
        assert "torch.ops.lightning_attention.forward.default(" in graph.code
        assert torch.equal(graph(inputs.q), expected)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        attention(inputs.q)
    assert name in {event.key for event in profile.key_averages()}


def test_fake_tensors_give_shapes_and_dtypes():
    with FakeTensorMode():
        q, v = (torch.empty(2, 1 << 20, 4, D, dtype=torch.bfloat16) for D in (64, 32))
        o, state = lightning_attention(q, q, v, torch.empty(4), output_final_state=True)
        assert (o.shape, o.dtype) == (v.shape, torch.bfloat16)
        assert state is not None
        assert (state.shape, state.dtype) == ((2, 4, 64, 32), torch.float32)
        packed = lightning_attention(
            q[:1], q[:1], v[:1], cu_seqlens=torch.empty(9, dtype=torch.int32), output_final_state=True
        )
        assert packed.final_state is not None
        assert packed.final_state.shape == (8, 4, 64, 32)


def test_meta_tensors_give_shapes():
    q = torch.empty(2, 9, 4, 8, device="meta")
    o, state = lightning_attention(q, q, q, torch.empty(4, device="meta"), output_final_state=True)
    assert state is not None
    assert (o.device.type, o.shape, state.shape) == ("meta", q.shape, (2, 4, 8, 8))


def test_autocast_casts_q_k_and_v_alone():
    """q, k and v may have different dtypes; decays, states and gradients stay float32."""
    inputs = make_inputs(Case(), torch.float32)
    q = inputs.q.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        o, state = lightning_attention(
            q, inputs.k.bfloat16(), inputs.v, inputs.log_decay, initial_state=inputs.state, output_final_state=True
        )
    assert state is not None
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    (dq,) = torch.autograd.grad(o.float().sum(), q)
    assert dq.dtype == torch.float32
    low = inputs.to(torch.bfloat16)
    expected, _ = lightning_attention(*low.qkv, low.log_decay, initial_state=low.initial_state)
    assert torch.equal(o, expected)
    with torch.autocast("cpu", torch.bfloat16):
        wide, _ = lightning_attention(*(x.double() for x in (q, inputs.k, inputs.v)))
        assert wide.dtype == torch.float64


BLOCKED = """
import sys
for name in ("transformers", "accelerate", "typer", "rich", "matplotlib", "tokenizers", "triton"):
    sys.modules[name] = None
import lightning_attention, torch
import lightning_attention.nn
x = torch.randn(1, 3, 2, 4)
lightning_attention.lightning_attention(x, x, x, lightning_attention.decay.log_decay(2, preset="alibi"))
"""


def test_the_operator_needs_only_torch():
    subprocess.run([sys.executable, "-c", BLOCKED], check=True)


def test_one_tensor_may_be_query_key_and_value_of_a_compiled_call():
    """The compiler takes no tensor twice as an input of an autograd function."""
    x = make_inputs(CASES[0], torch.float64).q.requires_grad_()

    def attention(x: torch.Tensor) -> torch.Tensor:
        return lightning_attention(x, x, x).output

    o, expected = torch.compile(attention, fullgraph=True, backend="aot_eager")(x), attention(x)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(torch.autograd.grad(o.sum(), x), torch.autograd.grad(expected.sum(), x))
