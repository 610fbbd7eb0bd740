"""Logits and gradients of a token have the same bits whatever else is in the batch, on a CPU."""

import pytest
import torch
from tiny_model import make_model, tokens
from torch import Tensor

from lightning_attention import decay, nn
from lightning_attention.inference.packing import reason_against
from lightning_attention.models import (
    LightningCache,
    LightningConfig,
    LightningForCausalLM,
    LightningForQuestionAnswering,
    LightningForSequenceClassification,
    LightningForTokenClassification,
    compile_layers,
)
from lightning_attention.nn import TokenMixer
from lightning_attention.training import segmented_loss

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
MODELS = {
    "lightning": {},
    "lrpe-d, llama": {"positions": "lrpe-d", "block": "llama"},
    "layer norm, head": {"norm": "layer", "tie_word_embeddings": False},
    "elu": {"linear_attention": "elu", "max_position_embeddings": 256},
    "cosformer": {"linear_attention": "cosformer", "max_position_embeddings": 256},
    "performer": {"linear_attention": "performer", "max_position_embeddings": 256},
}
LENGTH = 64  # a chunk of the operator, so that no sequence is split


@pytest.fixture(params=[1, 2], ids="{}_threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def run(model: LightningForCausalLM, ids: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and gradients of the embeddings, by a loss that is a sum over tokens."""
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    kept = inputs.get("attention_mask", torch.ones_like(ids)) != 0
    output = model(inputs_embeds=x, labels=ids.masked_fill(~kept, -100), num_items_in_batch=64, **inputs)
    output.loss.backward()
    assert x.grad is not None
    return output.logits.detach(), x.grad


@needs_mkl
@DTYPES
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_equals_alone(options, training, dtype, threads):
    model = make_model(dtype, invariant=True, **options).train(training)
    ids = tokens(5, LENGTH)
    alone = [run(model, row[None]) for row in ids]
    batch = run(model, ids)
    for n, (logits, _) in enumerate(alone):
        assert torch.equal(batch[0][n], logits[0])
    for n, (_, gradient) in enumerate(alone):
        assert torch.equal(batch[1][n], gradient[0])


@needs_mkl
@DTYPES
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_padded_equals_alone(options, dtype):
    model = make_model(dtype, invariant=True, **options)
    ids, mask = tokens(3, LENGTH + 5), torch.zeros(3, LENGTH + 5, dtype=torch.long)
    starts = 0, 2, 5
    for n, start in enumerate(starts):
        mask[n, start : start + LENGTH] = 1
    logits, gradients = run(model, ids, attention_mask=mask)
    for n, start in enumerate(starts):
        share = slice(start, start + LENGTH)
        alone, gradient = run(model, ids[n : n + 1, share])
        assert torch.equal(logits[n, share], alone[0])
        assert torch.equal(gradients[n, share], gradient[0])


@needs_mkl
@DTYPES
def test_packed_equals_alone(dtype):
    model = make_model(dtype, invariant=True)
    ids, bounds = tokens(1, 3 * LENGTH), torch.arange(4) * LENGTH
    packed = model(ids, cu_seqlens=bounds).logits[0].split(LENGTH)
    for n, logits in enumerate(packed):
        assert torch.equal(logits, model(ids[:, n * LENGTH : (n + 1) * LENGTH]).logits[0])


@needs_mkl
@DTYPES
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_checkpointed_equals_kept(dtype):
    model = make_model(dtype, invariant=True).train()
    ids = tokens(1, LENGTH)
    logits, gradient = run(model, ids)
    model.gradient_checkpointing_enable()
    recomputed = run(model, tokens(3, LENGTH))
    assert torch.equal(recomputed[0][0], logits[0])
    assert torch.equal(recomputed[1][0], gradient[0])


@needs_mkl
@DTYPES
@pytest.mark.parametrize("prompt", [1, 5, 64, 70])
def test_generated_equals_forward(prompt, dtype):
    model = make_model(dtype, invariant=True, eos_token_id=None).eval()
    output = model.generate(
        tokens(2, prompt), max_new_tokens=70, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        logits = model(output.sequences).logits[:, prompt - 1 : -1]
    assert torch.equal(torch.stack(output.logits, dim=1), logits.float())  # generate() returns float32


@needs_mkl
@DTYPES
@pytest.mark.parametrize("pieces", [[1] * 130, [5, 1, 1, 60, 63], [64, 1, 65], [129, 1]], ids=str)
@torch.no_grad()
def test_pieces_equal_forward(pieces, dtype):
    model = make_model(dtype, invariant=True).eval()
    ids, cache = tokens(2, sum(pieces)), LightningCache(3)
    logits = [model(piece, cache=cache).logits for piece in ids.split(pieces, dim=1)]
    assert torch.equal(torch.cat(logits, dim=1), model(ids).logits)


@needs_mkl
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_close_to_variant(options):
    ids = tokens(2, 77)
    expected = make_model(**options)(ids, labels=ids)
    output = make_model(invariant=True, **options)(ids, labels=ids)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)


@needs_mkl
@pytest.mark.parametrize(
    "kind", [LightningForSequenceClassification, LightningForTokenClassification, LightningForQuestionAnswering]
)
def test_classifier(kind):
    torch.manual_seed(0)
    model = kind(make_model(invariant=True).config).eval()
    ids = tokens(5, LENGTH)
    with torch.no_grad():
        batch, alone = model(ids), model(ids[2:3])
    name = "start_logits" if kind is LightningForQuestionAnswering else "logits"
    assert torch.equal(batch[name][2], alone[name][0])


def test_saved(tmp_path):
    make_model(torch.float32).save_pretrained(tmp_path / "a")
    model = LightningForCausalLM.from_pretrained(tmp_path / "a", invariant=True)
    mixers = [module for module in model.modules() if isinstance(module, TokenMixer)]
    assert mixers
    assert all(mixer.invariant for mixer in mixers)
    model.save_pretrained(tmp_path / "b")
    assert LightningConfig.from_pretrained(tmp_path / "b").invariant
    assert not LightningConfig.from_pretrained(tmp_path / "a").invariant


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer_pattern": "2:1"}, ValueError, "layer 2 has full_attention"),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": 4}, ValueError, "layer 0 has sliding_attention"),
        ({"linear_attention": "lightning-1"}, ValueError, "False for lightning-1 attention"),
        ({"linear_attention": "rfa", "positions": "none"}, ValueError, "False for rfa attention"),
        ({"hidden_size": 32769}, ValueError, "hidden_size below 32768"),
        ({"invariant": 1}, TypeError, "invariant must be True or False, got 1"),
    ],
    ids=["full", "sliding", "lightning-1", "rfa", "wide", "number"],
)
def test_refused(options, error, message):
    sizes = {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 3}
    with pytest.raises(error, match=message):
        LightningConfig(**sizes | {"invariant": True} | options)


def test_refused_later():
    model = make_model(torch.float32, invariant=True)
    assert "invariant" in str(reason_against(model))
    with pytest.raises(ValueError, match="invariant model cannot be compiled on a CPU"):
        compile_layers(model)
    model = model.bfloat16()
    with pytest.raises(ValueError, match=r"got torch\.bfloat16"):
        model(tokens(1, 4))


def test_states_and_shared_sequences_are_refused():
    """They do not say where the chunks of a sequence began."""
    model = make_model(torch.float32, invariant=True)
    ids, positions = tokens(1, 8), torch.arange(8)[None]
    states = [torch.zeros(1, *shape) for shape in model.model.state_shapes]
    with pytest.raises(ValueError, match="states go with no invariant=True"):
        model.model(ids, position_ids=positions, states=states)
    with pytest.raises(ValueError, match="training segments pass on states, which do not say where chunks began"):
        segmented_loss(model, ids, segment_length=4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.SoftmaxAttention(64, 4),
        lambda: nn.QuadraticLightningAttention(64, 4, decay.log_decay(4, preset="alibi")),
        lambda: nn.NormalizedLinearAttention(64, 4, nn.RandomFourierFeatures(4, 16)),
    ],
    ids=["softmax", "lightning-1", "rfa"],
)
def test_a_mixer_that_is_not_invariant_refuses_to_be(make):
    mixer = make()
    with pytest.raises(ValueError, match="invariant must be False for"):
        mixer.invariant = True
    with pytest.raises(TypeError, match="invariant must be True or False"):
        mixer.invariant = 1


@needs_mkl
@torch.no_grad()
def test_beams_equal_each_alone():
    """Caches are reordered in the middle of chunks."""
    model = make_model(torch.float32, invariant=True, eos_token_id=None).eval()
    ids, options = tokens(3, 20), {"num_beams": 3, "max_new_tokens": 40, "do_sample": False}
    together = model.generate(ids, **options)
    assert torch.equal(together, torch.cat([model.generate(row[None], **options) for row in ids]))
    assert torch.equal(together, model.generate(ids, **options, use_cache=False))
