"""Plans: launches prepared once for inputs of given metadata, and reused for other tensors."""

import ctypes
import weakref
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import INTERPRETED, Case, device_of, make_inputs
from torch import Tensor

triton = pytest.importorskip("triton", "3.6")

from ops.gluon_emulator import emulated  # noqa: E402

from lightning_attention import (  # noqa: E402
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_prefill,
    lightning_attention_step,
    lightning_attention_verify,
)
from lightning_attention.ops.backends import BACKENDS  # noqa: E402
from lightning_attention.ops.calls import call  # noqa: E402
from lightning_attention.ops.gpu import accumulate, plan  # noqa: E402
from lightning_attention.ops.gpu.segments import Segments, ceil_div  # noqa: E402
from lightning_attention.ops.hopper import config as hopper_config  # noqa: E402
from lightning_attention.ops.hopper import gradients, states  # noqa: E402
from lightning_attention.ops.hopper import kernels as hopper_kernels  # noqa: E402
from lightning_attention.ops.hopper import launch as hopper_launch  # noqa: E402
from lightning_attention.ops.inputs import AttentionInputs, GradientInputs  # noqa: E402
from lightning_attention.ops.triton import config, decoding, kernels  # noqa: E402

pytestmark = pytest.mark.triton
on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")


class Compiled:
    """A stand-in for compiled code that runs on a CPU, and takes addresses in place of tensors."""

    def __init__(self, kernel: Any, arguments: tuple, options: dict[str, Any]):
        self.kernel, self.options = kernel, options
        self.arguments = [without_memory(x) if isinstance(x, Tensor) else x for x in arguments]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*given: Any) -> None:
            pairs = zip(given, self.arguments, strict=True)
            arguments = [tensor_at(x, like) if isinstance(like, Tensor) else x for x, like in pairs]
            self.kernel[grid](*arguments, **self.options)

        return run


class Compiler:
    """A stand-in for a kernel that runs on a CPU, and counts compilations."""

    def __init__(self, kernel: Any):
        self.kernel, self.arg_names, self.__name__ = kernel, kernel.arg_names, kernel.__name__
        self.count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def run(*arguments: Any, **options: Any) -> Compiled:
            self.count += 1
            self.kernel[grid](*arguments, **options)
            return Compiled(self.kernel, arguments, options)

        return run


def without_memory(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def tensor_at(address: int, like: Tensor) -> Tensor:
    if not like.numel():
        return torch.empty_like(like, device="cpu")
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_char * (extent * like.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


@pytest.fixture(params=["triton", "hopper"])
def backend(monkeypatch, request):
    """A backend of GPU kernels; on a CPU the kernels are emulated, and count as compiled."""
    name = request.param
    if INTERPRETED:
        for place, module in (("kernels", hopper_kernels), ("gradients", gradients), ("states", states)):
            monkeypatch.setattr(hopper_launch, place, emulated(module))
        emulations = hopper_launch.kernels, hopper_launch.gradients, hopper_launch.states
        for module in (kernels, decoding, accumulate, *emulations):
            for kernel in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, kernel, Compiler(getattr(module, kernel)))
        monkeypatch.setattr(BACKENDS["hopper"], "unsupported_reasons", lambda problem: [])
    elif name == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    return name


CASES = [
    Case(B=2, T=70, H=1, K=64, V=64),
    Case(B=1, T=150, H=1, K=64, V=128, slope=None, state=False, scale=0.5),
    Case(lengths=(3, 0, 64, 70), H=1, K=128, V=128, slope=0.1),
]
# Dtypes of products that both a GPU and the emulation support.
DTYPES = {"triton": torch.float16, "hopper": torch.bfloat16}


def arguments_of(backend: str, case: Case, seed: int = 0) -> dict[str, tuple]:
    """Return arguments of a backend's `forward` and `backward`."""
    x = make_inputs(case, DTYPES[backend], seed).on(device_of("triton"))
    read = *x.qkv, x.log_decay, x.initial_state, x.cu_seqlens
    d_state = x.d_final_state if case.state else None
    forward, backward = AttentionInputs(*read), GradientInputs(*read, x.do, d_state)
    return {"forward": (forward, case.scale, True), "backward": (backward, case.scale)}


@pytest.mark.parametrize("num_segments", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_of_a_reused_plan_equal_those_of_a_new_plan(backend, monkeypatch, case, num_segments):
    """Calls after the first one launch compiled code."""

    def cut(length: int, *_: Any, **__: Any) -> Segments:
        interval = ceil_div(length, num_segments * 64) * 64
        return Segments(interval, interval, ceil_div(length, interval))

    for module in (config, hopper_config):
        monkeypatch.setattr(module, "segments", cut)
        monkeypatch.setattr(module, "MAX_SUMMED", 2)
    for name in ("forward", "backward"):
        run = partial(call, getattr(BACKENDS[backend], name))
        inputs = [arguments_of(backend, case, seed)[name] for seed in (0, 1, 2)]
        again = [run(*x) for x in inputs]
        for results, arguments in zip(again, inputs, strict=True):
            plan.clear()
            for found, expected in zip(results, run(*arguments), strict=True):
                assert torch.equal(found, expected)


STATES = {
    "contiguous": lambda x: x,
    "in bfloat16": lambda x: x.bfloat16(),
    "every other slot": lambda x: torch.cat([x, x], dim=1).view(4, *x.shape[1:])[::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "padded": lambda x: torch.nn.functional.pad(x, (0, 1))[..., :-1],
    "not aligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@pytest.mark.parametrize("layout", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("T", [None, 1, 3])
@pytest.mark.parametrize("indices", [None, [1, -1]], ids=["all", "slots"])
def test_steps_of_a_reused_plan_equal_those_of_new_plans(backend, indices, T, layout):
    """Steps update the state in place."""
    device = device_of("triton")
    indices = None if indices is None else torch.tensor(indices, device=device)

    def steps(*, with_new_plans: bool) -> list[Tensor]:
        found = []
        for seed in range(3):
            x = make_inputs(Case(T=T or 1, K=64, V=64), DTYPES[backend], seed).on(device)
            q, k, v = (y if T else y[:, 0].contiguous() for y in x.qkv)
            state = layout(x.state)
            if with_new_plans:
                plan.clear()
            o = lightning_attention_step(
                q, k, v, x.log_decay, state=state, state_indices=indices, scale=0.5, backend=backend
            )
            assert (o.shape, o.dtype) == (v.shape, v.dtype)
            found += [o, state]
        return found

    for found, expected in zip(steps(with_new_plans=False), steps(with_new_plans=True), strict=True):
        assert torch.equal(found, expected)


def test_inputs_of_a_known_plan_are_checked(backend):
    x = make_inputs(Case(T=1, K=64, V=64), DTYPES[backend]).on(device_of("triton"))
    lightning_attention_step(*x.qkv, x.log_decay, state=x.state, backend=backend)
    with pytest.raises(ValueError, match="state must be"):
        lightning_attention_step(*x.qkv, x.log_decay, state=x.state[:1], backend=backend)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU kernels are not counted")
@pytest.mark.parametrize("is_aligned", [True, False], ids=["aligned", "not aligned"])
def test_only_aligned_addresses_reuse_compiled_code(backend, is_aligned):
    q, k, v, log_decay, *_ = arguments_of(backend, Case(B=2, T=1, H=2, K=64, V=64))["forward"][0]
    k = STATES["contiguous" if is_aligned else "not aligned"](k)
    state = torch.zeros(2, 2, 64, 64)
    for _ in range(3):
        lightning_attention_step(q, k, v, log_decay, state=state, backend=backend)
    assert decoding.step_kernel.count == (1 if is_aligned else 3)


class Counter:
    """A stand-in for a kernel that is compiled, and computes nothing."""

    def __init__(self, kernel: Any):
        if not hasattr(kernel, "params"):  # Triton has prepared it for its interpreter
            kernel = triton.JITFunction(kernel.fn, **kernel.kwargs)
        self.params, self.arg_names, self.__name__ = kernel.params, kernel.arg_names, kernel.__name__
        self.count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def compile_and_run(*arguments: Any, **options: Any) -> dict:
            assert len(arguments) == len(self.params)
            self.count += 1
            return defaultdict(lambda: self._run)

        return compile_and_run

    def _run(self, *arguments: Any) -> None:
        assert len(arguments) == len(self.params)
        assert not any(isinstance(x, Tensor) for x in arguments)


@pytest.fixture
def counters(monkeypatch) -> list[Counter]:
    """All kernels, with the parameters that they have on a GPU."""
    if not INTERPRETED:
        pytest.skip("on a GPU kernels are not counted")
    monkeypatch.setattr(BACKENDS["hopper"], "unsupported_reasons", lambda problem: [])
    for place, module in (("kernels", hopper_kernels), ("gradients", gradients), ("states", states)):
        copied = {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}
        monkeypatch.setattr(hopper_launch, place, SimpleNamespace(**copied))
    found = []
    modules = kernels, decoding, accumulate, hopper_launch.kernels, hopper_launch.gradients, hopper_launch.states
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            found.append(Counter(getattr(module, name)))
            monkeypatch.setattr(module, name, found[-1])
    return found


def call_everything(backend: str, length: int, x: Callable[..., Tensor], *, with_options: bool) -> None:
    """Call every operator and its gradients with inputs that `x` makes."""
    q, k, v = (x(2, length, 2, 64).requires_grad_() for _ in range(3))
    log_decay, state = (-torch.ones(2), torch.ones(2, 2, 64, 64)) if with_options else (None, None)
    options: dict[str, Any] = {"backend": backend, "initial_state": state}
    o = lightning_attention(q, k, v, log_decay, output_final_state=with_options, **options).output
    torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    with torch.no_grad():
        lightning_attention_prefill(q, k, v, log_decay, state_positions=[1, 2], **options)
        q, k, v = q[:, :3], k[:, :3], v[:, :3]
        decoding: dict[str, Any] = {"backend": backend, "state": torch.ones(2, 2, 64, 64)}
        if with_options:
            decoding["state_indices"] = torch.tensor([1, 0])
        lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], log_decay, **decoding)
        if with_options:
            decoding["parents"] = torch.tensor([[-1, 0, 0], [-1, 0, 1]])
        lightning_attention_verify(q, k, v, log_decay, **decoding)
        lightning_attention_commit(k, v, log_decay, last=torch.tensor([2, 2]), **decoding)


@pytest.mark.parametrize("with_options", [False, True], ids=["required inputs", "all inputs"])
@pytest.mark.parametrize("num_segments", [1, 2, 3])
@pytest.mark.parametrize("name", ["triton", "hopper"])
def test_code_is_compiled_once_for_all_lengths(counters, monkeypatch, name, num_segments, with_options):
    for module in (config, hopper_config):
        monkeypatch.setattr(module, "segments", lambda *_, **__: Segments(64, 64, num_segments))
        monkeypatch.setattr(module, "MAX_SUMMED", 1)

    def contiguous(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=DTYPES[name])

    counts = []
    for length in (150, 150, 170):
        call_everything(name, length, contiguous, with_options=with_options)
        counts.append(sum(kernel.count for kernel in counters))
    assert counts[0] > 0
    assert counts == [counts[0]] * 3


def test_code_is_compiled_for_strides_that_are_multiples_of_16_and_for_others(counters):
    def padded(*shape: int) -> Tensor:
        return torch.ones(*shape[:-1], shape[-1] + 8, dtype=torch.float16)[..., : shape[-1]]

    def contiguous(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.float16)

    call_everything("triton", 64, contiguous, with_options=False)
    compiled = [kernel.count for kernel in counters]
    call_everything("triton", 64, padded, with_options=False)
    assert [kernel.count for kernel in counters] == [2 * count for count in compiled]


CHANGES = {
    "transposed": lambda q, k, v, *rest: (q.mT.contiguous().mT, k, v, *rest),
    "one tensor twice": lambda q, k, v, *rest: (q, q, v, *rest),
    "not aligned": lambda q, k, v, *rest: (q, torch.cat([k.new_zeros(1), k.flatten()])[1:].view_as(k), v, *rest),
    "padded": lambda q, k, v, *rest: (q, k, torch.nn.functional.pad(v, (0, 1))[..., :-1], *rest),
    "a strided decay": lambda q, k, v, log_decay, *rest: (q, k, v, log_decay.repeat_interleave(2)[::2], *rest),
    "no tokens": lambda q, k, v, *rest: (q[:, :0], k[:, :0], v[:, :0], *rest),
    "no batch rows": lambda q, k, v, log_decay, state, *rest: (q[:0], k[:0], v[:0], log_decay, state[:0], *rest),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_unusual_layouts_do_not_share_plans(backend, change):
    """Calls follow a usual call of the same shapes, and are repeated."""

    def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor) -> list[Any]:
        x = AttentionInputs(q, k, v, log_decay, initial_state, None)
        return call(BACKENDS[backend].forward, x, 0.5, True)

    arguments = arguments_of(backend, Case(T=3, K=64, V=64))["forward"][0][:5]
    usual = forward(*arguments)
    changed = change(*arguments)
    first, second = (forward(*changed) for _ in range(2))
    expected = forward(*[x.clone(memory_format=torch.contiguous_format) for x in changed])
    for x, y, z in zip(first, second, expected, strict=True):
        assert torch.equal(x, z)
        assert torch.equal(y, z)
    for x, y in zip(usual, forward(*arguments), strict=True):
        assert torch.equal(x, y)


def test_plans_keep_no_tensors(backend):
    x, *rest = arguments_of(backend, CASES[0])["forward"]
    results = call(BACKENDS[backend].forward, x, *rest)
    tensors = [weakref.ref(y) for y in (*x, *results) if y is not None]
    del x, results
    assert not any(y() is not None for y in tensors)


def test_threads_share_plans(backend):
    """Several threads make calls of several shapes, and clear the plans meanwhile."""
    inputs = [arguments_of(backend, Case(B=1, T=T, H=1, K=64, V=64), seed=T)["forward"] for T in range(1, 9)]
    forward = partial(call, BACKENDS[backend].forward)
    expected = [forward(*arguments)[0] for arguments in inputs]

    def is_equal(i: int) -> bool:
        if i % 10 == 0:
            plan.clear()
        o = forward(*inputs[i % len(inputs)])[0]
        return torch.equal(o, expected[i % len(inputs)])

    # The emulation of Hopper kernels runs one program at a time.
    num_threads = 1 if INTERPRETED else 4
    with ThreadPoolExecutor(num_threads) as pool:
        assert all(pool.map(is_equal, range(64)))


def test_a_launch_must_name_every_argument_of_its_kernel():
    planner = plan.Planner(torch.device("cpu"), 0, "ieee")
    x = planner.empty(4, dtype=torch.float32)
    arguments = dict.fromkeys(("interval_states", "factors", "log_decay"), x)
    with pytest.raises(TypeError, match=r"accumulate_kernel and its launch differ in arguments: BLOCK, .*, blocks"):
        planner.launch(accumulate.accumulate_kernel, 1, {}, **arguments, blocks=3)


def test_scratch_memory_lasts_for_one_call():
    """An allocator that the caller has set stays in place."""
    from triton.runtime._allocation import _allocator

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        raise AssertionError

    def call() -> None:
        triton.set_allocator(allocate)
        memory = plan.with_scratch(torch.device("cpu")).run(lambda size: _allocator.get()(size, 128, None), 1000)
        assert isinstance(memory, Tensor)
        assert (memory.numel(), memory.dtype) == (1000, torch.int8)
        assert _allocator.get() is allocate

    copy_context().run(call)  # other tests keep their allocator


@on_gpu
def test_profiling_keeps_results(backend):
    """Gradients too; the profiler sees the operators."""

    def call(seed: int) -> list[Tensor]:
        x = make_inputs(Case(B=1, T=200, H=2, K=64, V=64), torch.bfloat16, seed).on("cuda")
        q, k, v = (y.requires_grad_() for y in x.qkv)
        o, state = lightning_attention(q, k, v, x.log_decay, output_final_state=True, backend=backend)
        assert state is not None
        return [o, state, *torch.autograd.grad([o, state], [q, k, v], [x.do, x.d_final_state])]

    for seed in range(3):
        with torch.profiler.profile(acc_events=True) as profile:
            expected = call(seed)
        for found, value in zip(call(seed), expected, strict=True):
            assert torch.equal(found, value)
        names = {event.key for event in profile.key_averages()}
        assert {"lightning_attention::forward", "lightning_attention::backward"} <= names


@on_gpu
def test_plans_run_in_cuda_graphs_and_on_other_streams(backend):
    x = make_inputs(Case(B=1, T=200, H=2, K=64, V=64), torch.bfloat16).on("cuda")

    def call() -> Tensor:
        return lightning_attention(*x.qkv, x.log_decay, backend=backend).output

    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(call(), expected)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call()
    x.q.mul_(2)
    graph.replay()
    assert torch.equal(o, call())
