"""Products of decoder layers in float8 are close to those in bfloat16, and leave weights and their names alone."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny_model import make_config, tokens

from lightning_attention import nn
from lightning_attention.models import LightningForCausalLM, LightningForTokenClassification, compile_layers, use_float8
from lightning_attention.models.float8 import float8_error
from lightning_attention.training import segmented_loss

DEVICES = "cpu", pytest.param("cuda", marks=pytest.mark.gpu)
pytestmark = [
    pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def config(**changes):
    return make_config(**{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2} | changes)


def make(device: str = "cpu", **changes: Any) -> LightningForCausalLM:
    torch.manual_seed(0)
    return LightningForCausalLM(config(**changes)).to(device).train()


def gradients(
    model: LightningForCausalLM, ids: torch.Tensor, segment_length: int | None = None
) -> dict[str, torch.Tensor]:
    with torch.autocast(ids.device.type, torch.bfloat16):
        if segment_length is None:
            loss = model(ids, labels=ids, use_cache=False).loss
        else:
            loss = segmented_loss(model, ids, segment_length=segment_length)
    model.zero_grad()
    loss.backward()
    return {name: cast(torch.Tensor, x.grad) for name, x in model.named_parameters()}


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


HYBRID = {"layer_pattern": "1:1", "num_key_value_heads": 1}


@pytest.mark.parametrize("device", DEVICES)
def test_one_product_rounds_both_factors(device):
    model = make(device)
    before = cast(Any, model.model.layers[0]).mlp.vu_proj
    use_float8(model)
    after = cast(Any, model.model.layers[0]).mlp.vu_proj
    assert type(after) is not type(before)
    x = torch.randn(64, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    output_gradient = torch.randn(64, before.out_features, device=device)

    def product(linear):
        with torch.autocast(device, torch.bfloat16):
            y = linear(x)
        return y.detach(), *torch.autograd.grad(y, (x, linear.weight), output_gradient.to(y.dtype))

    # Each of two factors is rounded by at most 1/16 of itself: 13 % of the product of their absolute values.
    (y, dx, dw), (y0, dx0, dw0) = product(after), product(before)
    w = before.weight.detach()
    for found, expected, left, right in ((y, y0, x, w.t()), (dx, dx0, output_gradient, w)):
        bound = 0.14 * (left.detach().float().abs() @ right.abs()) + 1e-3
        assert ((found - expected).abs() <= bound).all()
        assert 0.01 < error(found, expected) < 0.06
    assert error(dw, dw0) < 0.01


@pytest.mark.parametrize("options", [{}, HYBRID], ids=["linear attention", "hybrid"])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_a_model_point_where_those_in_bfloat16_do(device, options):
    model, ids = make(device, **options), tokens(2, 80).to(device)
    expected = gradients(model, ids)
    use_float8(model)
    found = gradients(model, ids)
    assert found.keys() == expected.keys()
    # Roundings of later layers reach the gradients of earlier ones: 0.90 to 0.96 on CPUs; a wrong product gives 0.
    for name, gradient in expected.items():
        assert torch.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.8, name
        assert error(found[name], gradient) > 0.01 or "layers" not in name, name


@pytest.mark.parametrize("device", DEVICES)
def test_training_segments_change_nothing(device):
    model, ids = make(device), tokens(2, 96).to(device)
    use_float8(model)
    whole, cut = gradients(model, ids), gradients(model, ids, segment_length=32)
    assert max(error(cut[name], whole[name]) for name in whole) < 0.1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo's, which hides it unless it is an error
def test_compiled_gradients_are_as_close():
    model, ids = make("cuda"), tokens(1, 160).cuda()
    expected = gradients(model, ids)
    use_float8(model)
    eager = gradients(model, ids)
    compile_layers(model)
    compiled = gradients(model, ids)
    # A difference in the last bit before rounding to float8 is one of 6 % after it.
    for name in expected:
        assert error(compiled[name], expected[name]) < 1.5 * error(eager[name], expected[name]) + 0.1, name


def test_weights_and_checkpoints_stay(tmp_path):
    model = make()
    weights = dict(model.named_parameters())
    use_float8(model)
    assert all(weights[name] is weight for name, weight in model.named_parameters())
    assert len(weights) == len(list(model.parameters()))
    model.save_pretrained(tmp_path)
    assert "float8" not in json.dumps(json.loads((Path(tmp_path) / "config.json").read_text()))
    loaded = LightningForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(weights[name], weight) for name, weight in loaded.named_parameters())


def test_head_and_embedding_stay_as_they_are():
    model = LightningForTokenClassification(config(num_labels=16))
    use_float8(model)
    changed = {name.rsplit(".", 1)[-1] for name, x in model.named_modules() if type(x).__name__ == "Float8Linear"}
    assert changed == {"qkvu_proj", "out_proj", "vu_proj"}
    assert type(model.score) is torch.nn.Linear


def test_layers_of_other_sizes_stay_as_they_are():
    model = LightningForCausalLM(config(intermediate_size=100))
    use_float8(model)
    layer = cast(Any, model.model.layers[0])
    assert type(layer.mlp.vu_proj) is torch.nn.Linear
    assert type(layer.attention.out_proj) is not torch.nn.Linear


def test_quantised_layers_stay_as_they_are():
    class Quantised(torch.nn.Linear):
        pass

    model = make()
    mlp: Any = model.model.layers[0].mlp
    mlp.out_proj = Quantised(96, 64, bias=False)
    use_float8(model)
    assert type(mlp.out_proj) is Quantised
    assert type(mlp.vu_proj) is not torch.nn.Linear


def test_bad_models_are_refused():
    with pytest.raises(TypeError, match="takes a model with lightning attention layers, got SimpleGLU"):
        use_float8(nn.SimpleGLU(16, 16))
    with pytest.raises(ValueError, match="no plain linear layer has sizes that are multiples of 16"):
        use_float8(LightningForCausalLM(config(hidden_size=24, intermediate_size=40)))


def test_the_error_names_what_is_missing(monkeypatch):
    monkeypatch.setattr("lightning_attention.models.float8.find_spec", lambda name: None)
    assert "pip install 'lightning-attention[float8]'" in (float8_error(torch.device("cpu")) or "")


def test_the_error_says_what_a_device_lacks(monkeypatch):
    def convert(module, **options):
        raise RuntimeError("no such\n  product")

    monkeypatch.setattr("torchao.float8.convert_to_float8_training", convert)
    assert float8_error(torch.device("cpu")) == "products in float8 fail: no such product"
