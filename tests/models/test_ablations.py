"""Norms, gate and activations of a configuration: formulas, states, checkpoints, and what does not go together."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_model import make_config, tokens

from lightning_attention import nn
from lightning_attention.models import LightningCache, LightningConfig, LightningForCausalLM, compile_layers

ABLATIONS: dict[str, dict[str, Any]] = {
    "rms": {"norm": "rms"},
    "layer": {"norm": "layer"},
    "no gate": {"output_gate": False},
    "1+elu": {"qk_activation": "1+elu"},
    "no activation": {"qk_activation": "none"},
    "swiglu": {"glu_activation": "silu"},
    "all": {"norm": "layer", "output_gate": False, "qk_activation": "none", "glu_activation": "silu"},
    "elu attention": {
        "linear_attention": "elu", "norm": "rms", "output_gate": False, "max_position_embeddings": 64,
    },
}  # fmt: skip
BY_NAME = pytest.mark.parametrize("name", ABLATIONS)
ACTIVATIONS = {"silu": F.silu, "1+elu": lambda x: F.elu(x) + 1, "none": lambda x: x}


def make(name: str, dtype: torch.dtype = torch.float64) -> LightningForCausalLM:
    torch.manual_seed(0)
    model = LightningForCausalLM(make_config(**ABLATIONS[name], eos_token_id=None)).eval()
    with torch.no_grad():
        for weight in model.parameters():  # weights of norms too, which begin as ones and zeros
            weight += 0.1 * torch.randn_like(weight)
    return model.to(dtype)


def norm_by_formula(config: LightningConfig, x: torch.Tensor, weights: dict, name: str) -> torch.Tensor:
    if config.norm == "layer":
        centred = x - x.mean()
        y = centred / (centred.square().mean() + config.norm_eps).sqrt()
        return y * weights[name + ".weight"] + weights[name + ".bias"]
    y = x / (x.square().mean() + config.norm_eps).sqrt()
    return y * weights[name + ".weight"] if config.norm == "rms" else y


@pytest.mark.parametrize("name", [name for name in ABLATIONS if name != "elu attention"])
def test_forward_equals_formulas_token_by_token(name):
    model, ids = make(name), tokens(20)
    config, weights = model.config, model.state_dict()
    W, H = config.hidden_size, config.num_attention_heads
    D, act = W // H, ACTIVATIONS[config.qk_activation]
    states, expected = [torch.zeros(H, 2 * D, D).double() for _ in range(config.num_hidden_layers)], []
    for t, token in enumerate(ids):
        x = weights["model.embed_tokens.weight"][token] * math.sqrt(W)
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}."
            y = weights[layer + "attention.qkvu_proj.weight"] @ norm_by_formula(
                config, x, weights, layer + "attention_norm"
            )
            q, k, v, *u = y.split(W)
            q, k, v = act(q).view(H, D), act(k).view(H, D), v.view(H, D)
            if config.layer_has_lrpe(i):
                angle = weights[layer + "attention.lrpe.theta"] * t
                q, k = (torch.cat([y * angle.cos(), y * angle.sin()], dim=-1) for y in (q, k))
            state = torch.exp(config.layer_log_decay(i))[:, None, None] * states[i][:, : q.shape[1]]
            states[i] = state = state + k[:, :, None] * v[:, None, :]
            o = norm_by_formula(
                config, torch.einsum("hk,hkv->hv", q, state).flatten(), weights, layer + "attention.norm"
            )
            x = x + weights[layer + "attention.out_proj.weight"] @ (o * u[0] if u else o)
            y = norm_by_formula(config, x, weights, layer + "mlp_norm")
            v, u = (weights[layer + "mlp.vu_proj.weight"] @ y).chunk(2)
            x = x + weights[layer + "mlp.out_proj.weight"] @ ((F.silu(v) if config.glu_activation == "silu" else v) * u)
        expected.append(weights["lm_head.weight"] @ norm_by_formula(config, x, weights, "model.norm"))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[None]).logits[0], torch.stack(expected), rtol=1e-4, atol=1e-4)


@BY_NAME
def test_steps_and_packed_sequences_equal_one_call(name):
    model, ids = make(name), tokens(2, 30)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache, logits = LightningCache(model.config.num_hidden_layers), []
        for part in ids.split([20, *[1] * 10], dim=1):
            logits.append(model(part, cache=cache).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-5, atol=1e-5)
        packed = model(ids.view(1, -1), cu_seqlens=torch.tensor([0, 30, 30, 60]), use_cache=False).logits
        torch.testing.assert_close(packed.view_as(expected), expected, rtol=1e-5, atol=1e-5)


@BY_NAME
def test_loaded_equals_saved_and_generates_the_same(name, tmp_path):
    model, ids = make(name, torch.float32), tokens(2, 12)
    model.save_pretrained(tmp_path)
    loaded = LightningForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    found = loaded.generate(ids, max_new_tokens=6, do_sample=False)
    for _ in range(6):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)


@BY_NAME
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute:UserWarning"
)
def test_compiled_gradients_equal_eager_ones(name):
    eager, compiled = make(name, torch.float32), make(name, torch.float32)
    compile_layers(compiled, "aot_eager")
    ids = tokens(2, 40)
    for model in (eager, compiled):
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
    for (parameter, x), y in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-6, msg=parameter)
        assert x.grad is not None
        assert bool(x.grad.any())
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["rms", "layer"])
def test_new_norms_do_nothing_but_normalise(name):
    with torch.device("meta"):
        model = LightningForCausalLM(make_config(norm=name))
    model = model.to_empty(device="cpu")
    model.init_weights()
    weights = {key: x for key, x in model.state_dict().items() if "norm" in key}
    assert len(weights) == (3 * 3 + 1) * (2 if name == "layer" else 1)
    assert all(bool((x == (1 if key.endswith("weight") else 0)).all()) for key, x in weights.items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"norm": "batch"}, ValueError, "norm must be one of simple_rms, rms, layer, got 'batch'"),
        ({"norm": 1}, ValueError, "norm must be one of"),
        ({"qk_activation": "relu"}, ValueError, "qk_activation must be one of silu, 1[+]elu, none, got 'relu'"),
        ({"glu_activation": "1+elu"}, ValueError, "glu_activation must be one of none, silu, got"),
        ({"output_gate": 1}, TypeError, "output_gate must be True or False, got 1"),
        (
            {"linear_attention": "cosformer", "max_position_embeddings": 9, "qk_activation": "none"},
            ValueError,
            "qk_activation goes with lightning attention, not with cosformer",
        ),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        make_config(**options)


@pytest.mark.parametrize(
    "make_layer", [lambda: nn.make_norm("l2", 4, 1e-6), lambda: nn.SimpleGLU(4, 4, activation="x")]
)
def test_unknown_names_are_refused(make_layer):
    with pytest.raises(ValueError, match="must be one of"):
        make_layer()
