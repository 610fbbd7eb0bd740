"""Outgoing and incoming states of slices, in PyTorch and by the kernels."""

import pytest
import torch
from oracle import Case, assert_accurate, attention, device_of, make_inputs, run

from lightning_attention.distributed import states
from lightning_attention.distributed.slices import local_slice
from lightning_attention.ops.states import finite_log_decay

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
RUNS = [
    pytest.param("chunked", FP32, id="pytorch-float32"),
    pytest.param("chunked", BF16, id="pytorch-bfloat16"),
    pytest.param("triton", FP32, id="kernels-float32", marks=pytest.mark.triton),
    pytest.param("triton", FP16, id="kernels-float16", marks=pytest.mark.triton),
    pytest.param("triton", BF16, id="kernels-bfloat16", marks=pytest.mark.gpu),
]
runs = pytest.mark.parametrize(("backend", "dtype"), RUNS)


@runs
def test_two_slices_equal_one(backend, dtype):
    """Gradients too, for a sequence that crosses from the first slice to the second, between other sequences."""
    lengths, bounds = (50, 40), (0, 20, 70, 90)
    first, second = (local_slice(rank, lengths, bounds) for rank in range(2))
    assert (first.suffix_length, second.prefix_length) == (30, 20)

    def call(q, k, v, log_decay, *, scale, **_):
        (q0, q1), (k0, k1), (v0, v1) = (x.split(lengths, dim=1) for x in (q, k, v))
        state_decay = finite_log_decay(q, log_decay)

        def attend(local, q, k, v):
            cu_seqlens = torch.tensor(local.cu_seqlens, device=q.device)
            return attention(backend)(q, k, v, log_decay, cu_seqlens=cu_seqlens, scale=scale)

        state, k0, v0 = states.outgoing_state(k0, v0, None, state_decay, first, backend)
        o0, final0 = attend(first, q0, k0, v0)
        o1, final1 = attend(second, q1, k1, v1)
        o1 = states.add_incoming_(o1, q1, state, state_decay, second.prefix_length, scale, backend)
        crossing = final1[:1] + state * states.power(state_decay, second.prefix_length)
        return torch.cat([o0, o1], dim=1), torch.cat([final0[:1], crossing, final1[1:]])

    case = Case(lengths=(20, 50, 20), H=2, K=24, V=16, slope=0.1, scale=0.3, state=False)
    inputs = make_inputs(case, dtype).on(device_of(backend))
    assert_accurate(run(call, inputs), inputs)
