"""Calls made again: recorded with some arguments, replayed with others that look alike."""

import ctypes
import weakref
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import pytest
import torch
from ops.test_triton import STATES
from oracle import INTERPRETED, Case, device_of, make_inputs
from torch import Tensor

triton = pytest.importorskip("triton", "3.6")

from ops.gluon_emulator import emulated  # noqa: E402

from lightning_attention import lightning_attention  # noqa: E402
from lightning_attention.ops import api, hopper, library  # noqa: E402
from lightning_attention.ops.hopper import gradients, states  # noqa: E402
from lightning_attention.ops.hopper import kernels as hopper_kernels  # noqa: E402
from lightning_attention.ops.hopper import launch as hopper_launch  # noqa: E402
from lightning_attention.ops.triton import config, decoding, kernels, launch  # noqa: E402
from lightning_attention.ops.triton.replay import record, with_scratch  # noqa: E402

pytestmark = pytest.mark.triton
on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")


class Code:
    """A kernel that runs on a CPU, as it is when compiled: it takes addresses for what these arguments are."""

    def __init__(self, kernel: Any, arguments: tuple, options: dict[str, Any]):
        self.kernel, self.options = kernel, options
        self.arguments = [look_of(x) if isinstance(x, Tensor) else x for x in arguments]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*given: Any) -> None:
            pairs = zip(given, self.arguments, strict=True)
            arguments = [tensor_at(x, like) if isinstance(like, Tensor) else x for x, like in pairs]
            self.kernel[grid](*arguments, **self.options)

        return run


class Compiler:
    """A kernel that runs on a CPU, and then is compiled."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Code]:
        def run(*arguments: Any, **options: Any) -> Code:
            self.kernel[grid](*arguments, **options)
            return Code(self.kernel, arguments, options)

        return run


def look_of(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def tensor_at(address: int, like: Tensor) -> Tensor:
    if not like.numel():
        return torch.empty_like(like, device="cpu")
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_char * (extent * like.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


@pytest.fixture(params=["triton", "hopper"])
def backend(monkeypatch, request):
    """Either; on a CPU its kernels run emulated, and are compiled for all that."""
    name = request.param
    if INTERPRETED:
        for place, module in (("kernels", hopper_kernels), ("gradients", gradients), ("states", states)):
            monkeypatch.setattr(hopper_launch, place, emulated(module))
        emulations = hopper_launch.kernels, hopper_launch.gradients, hopper_launch.states
        for module in (kernels, decoding, *emulations):
            for kernel in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, kernel, Compiler(getattr(module, kernel)))
        monkeypatch.setattr(launch, "_compiled", {})
        monkeypatch.setattr(hopper, "unsupported_reasons", lambda problem: [])
    elif name == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    return name


CASES = [
    Case(B=2, T=70, H=2, K=64, V=64),
    Case(B=1, T=150, H=1, K=64, V=128, slope=None, state=False, scale=0.5),
    Case(lengths=(3, 0, 64, 70), H=1, K=128, V=128, slope=0.1),
]


# What both the GPU and the emulation of a backend multiply.
DTYPES = {"triton": torch.float16, "hopper": torch.bfloat16}


def asked(backend: str, case: Case, seed: int = 0) -> tuple[tuple, tuple]:
    """Arguments of a backend's `forward` and `backward`."""
    x = make_inputs(case, DTYPES[backend], seed).on(device_of("triton"))
    d_state = x.d_final_state if case.state else None
    forward = x.q, x.k, x.v, x.log_decay, x.initial_state, x.cu_seqlens, case.scale, True
    return forward, (*forward[:3], x.do, *forward[3:5], d_state, x.cu_seqlens, case.scale)


@pytest.mark.parametrize("num_segments", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_replay_computes_the_same(backend, monkeypatch, case, num_segments):
    """Of other numbers, to the last bit."""

    def cut(length: int, *_: Any, **__: Any) -> config.Segments:
        interval = config.ceil_div(length, num_segments * 64) * 64
        return config.Segments(interval, interval, config.ceil_div(length, interval))

    for module in (config, hopper_launch.config):
        monkeypatch.setattr(module, "segments", cut)
        monkeypatch.setattr(module, "MAX_SUMMED", 2)
    functions = [getattr(library.BACKENDS[backend], name) for name in ("forward", "backward")]
    replays = [
        record(function, *arguments)[1] for function, arguments in zip(functions, asked(backend, case), strict=True)
    ]
    for seed in (1, 2):
        for function, replay, arguments in zip(functions, replays, asked(backend, case, seed), strict=True):
            assert replay is not None
            for found, expected in zip(replay(*arguments), function(*arguments), strict=True):
                assert found is expected is None or torch.equal(found, expected)


@pytest.mark.parametrize(("strided", "lookups"), STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("T", [None, 1, 3])
@pytest.mark.parametrize("indices", [None, [1, -1]], ids=["all", "slots"])
def test_a_step_is_replayed(backend, indices, T, strided, lookups):
    """With the shape that was asked for, and the state updated in place, if it lies as usual."""
    device = device_of("triton")
    indices = None if indices is None else torch.tensor(indices, device=device)

    def arguments(seed: int) -> tuple:
        x = make_inputs(Case(T=T or 1, K=64, V=64), DTYPES[backend], seed).on(device)
        qkv = [x.q, x.k, x.v] if T else [y[:, 0].contiguous() for y in (x.q, x.k, x.v)]
        return *qkv, x.log_decay, strided(x.state), indices, 0.5, backend

    _, replay = record(api._step, *arguments(0))
    assert (replay is not None) == (lookups == 1)
    if replay is None:
        return
    given, same = arguments(1), arguments(1)
    o, expected = replay(*given), api._step(*same)
    assert (o.shape, o.dtype) == (given[2].shape, given[2].dtype)
    assert torch.equal(o, expected)
    assert torch.equal(given[4], same[4])


NOT_RECORDED = {
    "columns": lambda q, k, v, *rest: (q.mT.contiguous().mT, k, v, *rest),
    "one tensor twice": lambda q, k, v, *rest: (q, q, v, *rest),
    "odd addresses": lambda q, k, v, *rest: (q, torch.cat([k.new_zeros(1), k.flatten()])[1:].view_as(k), v, *rest),
    "odd rows": lambda q, k, v, *rest: (q, k, torch.nn.functional.pad(v, (0, 1))[..., :-1], *rest),
    "a decay with gaps": lambda q, k, v, log_decay, *rest: (q, k, v, log_decay.repeat_interleave(2)[::2], *rest),
    "no tokens": lambda q, k, v, *rest: (q[:, :0], k[:, :0], v[:, :0], *rest),
    "no rows": lambda q, k, v, log_decay, state, *rest: (q[:0], k[:0], v[:0], log_decay, state[:0], *rest),
}


@pytest.mark.parametrize("change", NOT_RECORDED.values(), ids=NOT_RECORDED.keys())
def test_what_is_not_recorded(backend, change):
    """Copies, what launches nothing, and what cannot be told apart: of sequences and of steps."""
    forward, step = library.BACKENDS[backend].forward, api._step
    case = Case(T=3, K=64, V=64)
    for function, options in ((forward, (None, 0.5, True)), (step, (None, 0.5, backend))):
        expected = function(*change(*asked(backend, case)[0][:5], *options))
        result, replay = record(function, *change(*asked(backend, case)[0][:5], *options))
        assert replay is None
        for found, value in zip(result, expected, strict=True):
            assert torch.equal(found, value)


def test_a_function_that_does_more_is_not_recorded(backend):
    """One that computes something of its arguments, or of what was launched, or returns a part of it."""
    arguments, _ = asked(backend, CASES[0])
    forward = library.BACKENDS[backend].forward
    assert record(forward, *arguments)[1] is not None
    functions = (
        lambda q, *rest: forward(2 * q, *rest),
        lambda *arguments: 2 * forward(*arguments)[0],
        lambda *arguments: forward(*arguments)[0][:, :-1],
        lambda *arguments: forward(*arguments)[0][:, 1:],
        lambda *arguments: arguments[0],
    )
    for function in functions:
        assert record(function, *arguments)[1] is None


def test_what_was_recorded_is_freed(backend):
    arguments = asked(backend, CASES[0])[0]
    result, replay = record(library.BACKENDS[backend].forward, *arguments)
    assert replay is not None
    tensors = [weakref.ref(x) for x in (*arguments, *result) if isinstance(x, Tensor)]
    del arguments, result
    assert not any(x() is not None for x in tensors)


def test_memory_for_descriptors_is_there_for_one_call():
    """And what allocates for others stays."""
    from triton.runtime._allocation import _allocator

    def others(size: int, alignment: int, stream: int | None) -> Tensor:
        raise AssertionError

    def call_after_others() -> Tensor:
        triton.set_allocator(others)
        allocated = with_scratch(torch.device("cpu"), lambda size: _allocator.get()(size, 128, None), 1000)
        assert _allocator.get() is others
        return allocated

    allocated = copy_context().run(call_after_others)  # other tests keep theirs
    assert (allocated.numel(), allocated.dtype) == (1000, torch.int8)


@on_gpu
def test_calls_are_replayed(backend):
    """Those that look alike, and no others, with gradients too; under a profiler none is."""

    def call(seed: int, change: Callable = lambda *qkv: qkv, **options: Any) -> list[Tensor]:
        x = make_inputs(Case(B=1, T=200, H=2, K=64, V=64), torch.bfloat16, seed).on("cuda")
        qkv = [y.requires_grad_() for y in change(x.q, x.k, x.v)]
        o, state = lightning_attention(*qkv, x.log_decay, output_final_state=True, backend=backend, **options)
        return [o, state, *torch.autograd.grad([o, state], qkv, [x.do, x.d_final_state])]

    def profiled(*arguments: Any) -> list[Tensor]:
        with torch.autograd.profiler.profile():
            return call(*arguments)

    for seed in range(3):
        for found, expected in zip(call(seed), profiled(seed), strict=True):
            assert torch.equal(found, expected)
    assert len(library._replays) == 2
    call(0, scale=0.5)
    assert len(library._replays) == 4
    shifted = call(0, lambda q, k, v: (q, torch.cat([k.new_zeros(1), k.flatten()])[1:].view_as(k), v))
    for found, expected in zip(shifted, call(0), strict=True):
        assert torch.equal(found, expected)
    assert len(library._replays) == 4
    with pytest.raises(ValueError, match="k must have the shape of q"):
        call(0, lambda q, k, v: (q, k[:, 1:], v))


@on_gpu
def test_as_many_looks_as_are_kept(monkeypatch):
    monkeypatch.setattr(library, "MAX_REPLAYS", 3)
    q, k, v = torch.randn(3, 2, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
    found = []
    for T in (8, 9, 10, 11, 8):
        lightning_attention(q[:, :T], k[:, :T], v[:, :T])
        found.append(len(library._replays))
    assert found == [1, 2, 3, 1, 2]


@on_gpu
def test_a_replay_in_a_graph_and_on_another_stream(backend):
    x = make_inputs(Case(B=1, T=200, H=2, K=64, V=64), torch.bfloat16).on("cuda")

    def call() -> Tensor:
        return lightning_attention(x.q, x.k, x.v, x.log_decay, backend=backend).output

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
