"""Models with Lightning-1 compute what models with lightning attention do, and say where they cannot."""

from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_model import make_model, tokens

from lightning_attention.inference import Engine, SamplingOptions
from lightning_attention.models import LightningCache, LightningForCausalLM, compile_layers
from lightning_attention.training import TrainingOptions, segmented_loss, train

DEVICES = "cpu", pytest.param("cuda", marks=pytest.mark.gpu)
PARTS = torch.tensor([0, 7, 7, 40, 60])


def pair(device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[LightningForCausalLM]:
    """A model with Lightning-1, and one with lightning attention."""
    models = [
        make_model(dtype, linear_attention=name, positions="mix", eos_token_id=None).to(device).eval()
        for name in ("lightning-1", "lightning")
    ]
    models[0].load_state_dict(models[1].state_dict())
    return models


@pytest.mark.parametrize("inputs", ["whole", "packed", "padded"])
@pytest.mark.parametrize("device", DEVICES)
def test_outputs_and_gradients_are_those_of_lightning_attention(device, inputs):
    ids = tokens(1 if inputs == "packed" else 2, 60).to(device)
    options = {
        "whole": {},
        "packed": {"cu_seqlens": PARTS.to(device)},
        "padded": {"attention_mask": (torch.arange(60) >= torch.tensor([[9], [0]])).long().to(device)},
    }[inputs]
    dtype = torch.float64 if device == "cpu" else torch.float32
    (loss, *gradients), (expected, *others) = (
        [
            y := model(ids, labels=ids, use_cache=False, **options).loss,
            *torch.autograd.grad(y, list(model.parameters())),
        ]
        for model in pair(device, dtype)
    )
    rtol, atol = (1e-9, 1e-9) if device == "cpu" else (1e-3, 1e-4)
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(gradients, others, rtol=rtol, atol=atol)


def test_decoding_goes_on_from_states(tmp_path):
    model, other = pair()
    ids, cache = tokens(2, 20), LightningCache(3)
    with torch.no_grad():
        logits = [model(part, cache=cache).logits for part in ids.split([12, 1, 7], dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids, use_cache=False).logits, rtol=1e-9, atol=1e-9)
    expected = other.generate(ids[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=8, do_sample=False), expected)
    (answer,) = Engine(model).run([ids[0].tolist()], SamplingOptions(max_new_tokens=8, temperature=0))
    assert answer.tokens == expected[0, 20:].tolist()
    model.save_pretrained(tmp_path)
    loaded = LightningForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.linear_attention == "lightning-1"


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute:UserWarning"
)
def test_compiled_equals_eager():
    (model, other), ids = pair(), tokens(1, 60)
    compile_layers(model, "aot_eager")
    losses = [x.train()(ids, labels=ids, use_cache=False, cu_seqlens=PARTS).loss for x in (model, other)]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    for loss in losses:
        loss.backward()
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)
    torch.compiler.reset()


def test_bfloat16_autocast_casts_queries_keys_and_values():
    models, ids = pair(dtype=torch.float32), tokens(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = (model(ids, labels=ids, use_cache=False).loss for model in models)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)


def test_training_segments_are_refused(tmp_path):
    message = "training segments pass on states, which lightning-1 attention does not compute"
    with pytest.raises(ValueError, match=message):
        segmented_loss(pair()[0], tokens(1, 20), segment_length=10)
    (tmp_path / "text.txt").write_text("one two three " * 200)
    options = TrainingOptions(
        tmp_path / "run", (tmp_path / "text.txt",), attention="lightning-1", sequence_length=32, segment_length=16
    )
    with pytest.raises(ValueError, match=message):
        train(options, console=Console(quiet=True))
    assert not (tmp_path / "run" / "run.json").exists()


def test_ranks_that_share_tokens_are_refused():
    model = pair()[0]
    layer: Any = model.model.layers[0].attention
    layer.sequence_parallel = object()
    with pytest.raises(ValueError, match="lightning-1 has no states to exchange"):
        layer(torch.randn(1, 4, 24).double(), torch.arange(4)[None])
