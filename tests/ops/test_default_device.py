"""Calls with tensors on another device than the default one; "meta" stands in for a GPU."""

import pytest
import torch
from oracle import Case, Inputs, make_inputs, run

from lightning_attention import (
    decay,
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_prefill,
    lightning_attention_step,
    lightning_attention_verify,
)
from lightning_attention.nn import GatedLightningAttention

fixed, packed = make_inputs(Case(T=140)), make_inputs(Case(lengths=(7, 0, 133)))
no_decay, drafts = make_inputs(Case(slope=None)), make_inputs(Case(T=3))
POSITIONS = torch.tensor([3, 130])
TREE, LAST, SLOTS = torch.tensor([[-1, 0, 0], [-1, -1, 1]]), torch.tensor([2, 0]), torch.tensor([1, -1])


def attend(inputs, backend):
    def call(q, k, v, log_decay, **options):
        return lightning_attention(q, k, v, log_decay, output_final_state=True, backend=backend, **options)

    return tuple(run(call, inputs).values())


def step(tokens, indices, backend):
    state = drafts.state.clone()
    q, k, v = (x[:, 0] if tokens == 1 else x for x in drafts.qkv)
    o = lightning_attention_step(q, k, v, drafts.log_decay, state=state, state_indices=indices, backend=backend)
    return o, state


def verify(parents, indices, backend):
    options = {"state": drafts.state, "parents": parents, "state_indices": indices, "backend": backend}
    return (lightning_attention_verify(*drafts.qkv, drafts.log_decay, **options),)


def commit(parents, indices, backend):
    state = drafts.state.clone()
    options = {"last": LAST, "parents": parents, "state_indices": indices, "backend": backend}
    lightning_attention_commit(drafts.k, drafts.v, drafts.log_decay, state=state, **options)
    return (state,)


def prefill(inputs: Inputs, positions, backend):
    options = {"initial_state": inputs.initial_state, "cu_seqlens": inputs.cu_seqlens, "backend": backend}
    return tuple(lightning_attention_prefill(*inputs.qkv, inputs.log_decay, state_positions=positions, **options))


CALLS = {
    "attention": lambda backend: attend(fixed, backend),
    "attention, packed": lambda backend: attend(packed, backend),
    "attention, no decay": lambda backend: attend(no_decay, backend),
    "step": lambda backend: step(1, None, backend),
    "step, slots": lambda backend: step(1, SLOTS, backend),
    "step, three tokens": lambda backend: step(3, SLOTS, backend),
    "verify, chain": lambda backend: verify(None, None, backend),
    "verify, tree": lambda backend: verify(TREE, SLOTS, backend),
    "commit, chain": lambda backend: commit(None, None, backend),
    "commit, tree": lambda backend: commit(TREE, SLOTS, backend),
    "prefill": lambda backend: prefill(fixed, POSITIONS, backend),
    "prefill, packed": lambda backend: prefill(packed, POSITIONS, backend),
    "prefill, list": lambda backend: prefill(packed, [3, 130], backend),
}


@pytest.fixture
def default_meta():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("call", CALLS)
def test_default_device_keeps_results_of_operators(call, backend, request):
    expected = CALLS[call](backend)
    request.getfixturevalue("default_meta")
    for actual, exact in zip(CALLS[call](backend), expected, strict=True):
        assert torch.equal(actual, exact)


def test_decays_are_on_the_cpu(default_meta):
    for preset in decay.PRESETS:
        assert decay.log_decay(4, layer_idx=1, num_layers=3, preset=preset).device.type == "cpu"
    assert decay.alibi_slopes(4).device.type == "cpu"


def test_default_device_keeps_results_of_a_layer(request):
    layer = GatedLightningAttention(24, 3, decay.log_decay(3, preset="alibi"), lrpe=True)
    x, positions = torch.randn(2, 5, 24), torch.arange(5)[None]
    with torch.no_grad():
        expected, state = layer(x, positions, state=torch.zeros(2, 3, 16, 8))
        request.getfixturevalue("default_meta")
        actual, new_state = layer(x, positions, state=torch.zeros(2, 3, 16, 8, device="cpu"))
    assert torch.equal(actual, expected)
    assert torch.equal(new_state, state)
