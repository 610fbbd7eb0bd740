"""Decoding with packed weights."""

import threading
from typing import Any

import pytest
import torch
from tiny_model import make_model
from torch import nn

from lightning_attention.inference import Engine, SamplingOptions
from lightning_attention.inference.packing import PackedWeights, can_pack, reason_against

PROMPTS = [[11, 12, 13], [14, 15, 16, 17, 18], [19]]
GREEDY = SamplingOptions(max_new_tokens=12, temperature=0)

pytestmark = pytest.mark.skipif(
    reason_against(nn.Linear(2, 2, bias=False)) is not None, reason="this build of PyTorch does not pack weights"
)


def answers(model, **options) -> list[list[int]]:
    return [completion.tokens for completion in Engine(model, **options).run(PROMPTS, GREEDY)]


def forwards(model) -> list[str]:
    """Layers whose forward is replaced."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_answers_are_those_of_weights_that_are_not_packed(dtype, tied):
    model = make_model(dtype, tie_word_embeddings=tied)
    assert can_pack(model)
    assert answers(model, pack_weights=True) == answers(model)
    assert not forwards(model)


@pytest.mark.parametrize("change", ["optimizer", "load_state_dict", "in place", "another parameter"])
def test_changed_weights_are_packed_again(change):
    model, other = make_model(torch.float32), make_model(torch.float32)
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(torch.randn_like(weight) / 3)
    engine = Engine(model, pack_weights=True)
    before = [completion.tokens for completion in engine.run(PROMPTS, GREEDY)]
    if change == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif change == "in place":
        with torch.no_grad():
            for weight, new in zip(model.parameters(), other.parameters(), strict=True):
                weight.copy_(new)
    elif change == "optimizer":
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for weight, new in zip(model.parameters(), other.parameters(), strict=True):
            weight.grad = weight.detach() - new.detach()
        optimizer.step()
    else:
        layer: Any = model.model.layers[0]
        new_layer: Any = other.model.layers[0]
        layer.attention.qkvu_proj.weight = new_layer.attention.qkvu_proj.weight
    after = [completion.tokens for completion in engine.run(PROMPTS, GREEDY)]
    assert after == answers(model)
    assert after != before


def test_layers_that_are_not_plain_are_called():
    model = make_model(torch.float32)
    calls = []
    layer: Any = model.model.layers[1]
    hook = layer.mlp.out_proj.register_forward_hook(lambda *_: calls.append(1))
    found = answers(model, pack_weights=True)
    assert len(calls) >= GREEDY.max_new_tokens
    hook.remove()
    assert found == answers(model)


def test_calls_of_the_model_in_another_thread_have_gradients():
    model = make_model(torch.float32)
    packed, ids = PackedWeights(model), torch.tensor([PROMPTS[0]])
    expected = model(ids).logits
    found = []
    with torch.no_grad(), packed.in_use(0):
        assert forwards(model)
        thread = threading.Thread(target=lambda: found.append(model(ids).logits))
        thread.start()
        thread.join()
    assert found[0].requires_grad
    torch.testing.assert_close(found[0], expected)


def test_layers_are_as_before_after_an_error():
    model = make_model(torch.float32)
    packed = PackedWeights(model)
    with pytest.raises(RuntimeError, match="stop"), packed.in_use(0):
        raise RuntimeError("stop")
    assert not forwards(model)


def test_a_model_that_cannot_be_packed_is_refused():
    model = make_model(torch.float64)
    assert not can_pack(model)
    with pytest.raises(ValueError, match=r"pack_weights must be False for this model: .* float32 or bfloat16"):
        Engine(model, pack_weights=True)
    with pytest.raises(TypeError, match="pack_weights must be True or False, got 1"):
        Engine(make_model(torch.float32), pack_weights=1)  # pyright: ignore[reportArgumentType]
