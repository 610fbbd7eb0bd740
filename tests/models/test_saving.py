"""What is saved is what is loaded: every weight, whatever was done to the model before."""

import copy
import os
import stat

import pytest
import torch
from safetensors import safe_open
from tiny_model import VOCAB, make_config, tokens
from torch import nn

from lightning_attention.models import LightningConfig, LightningForCausalLM, LightningModel


@pytest.fixture
def model() -> LightningForCausalLM:
    torch.manual_seed(0)
    return LightningForCausalLM(make_config(positions="lrpe-d")).eval()


def new_parameter(model):
    model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, 24))


def new_head(model):
    model.set_output_embeddings(nn.Linear(24, VOCAB, bias=False))


def new_embedding(model):
    model.set_input_embeddings(nn.Embedding(VOCAB, 24))


def trained_copy(model):
    """What PEFT's `modules_to_save=["lm_head"]` leaves after `merge_and_unload`."""
    head = copy.deepcopy(model.lm_head)
    head.weight.data += 1
    model.lm_head = head


def option_alone(model):
    """Says that the head is its own, where it is not."""
    model.config.tie_word_embeddings = False


CHANGES = [new_parameter, new_head, new_embedding, trained_copy, option_alone]


@pytest.mark.parametrize("change", [*CHANGES, None], ids=lambda change: change.__name__ if change else "as built")
@pytest.mark.parametrize("as_trainer", [False, True], ids=["save_pretrained", "state_dict given"])
def test_no_weight_is_lost(model, change, as_trainer, tmp_path):
    if change:
        change(model)
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    state = {name: x.clone() for name, x in model.state_dict().items()} if as_trainer else None
    model.save_pretrained(tmp_path, **{"state_dict": state} if state else {})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != is_tied  # noqa: SIM118, a file is no dictionary
    loaded, report = LightningForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.eval()(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
    assert loaded.config.tie_word_embeddings == is_tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == is_tied
    loaded.save_pretrained(tmp_path / "again")
    again = LightningForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


def test_a_head_tied_after_building_is_stored_once(tmp_path):
    model = LightningForCausalLM(make_config(tie_word_embeddings=False)).eval()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = LightningForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("size", [VOCAB + 6, 20])
def test_a_resized_vocabulary_loads(tie, size, tmp_path):
    model = LightningForCausalLM(make_config(tie_word_embeddings=tie)).eval()
    model.resize_token_embeddings(size, mean_resizing=False)
    model.save_pretrained(tmp_path)
    loaded = LightningForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens(1, 9) % 20
    assert loaded.config.vocab_size == size
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id", "bos_token_id"])
def test_a_vocabulary_keeps_its_special_tokens(name):
    model = LightningForCausalLM(make_config(**{name: 40}))
    with pytest.raises(ValueError, match=rf"{name} must be None or in \[0, vocab_size = 30\), got 40"):
        model.resize_token_embeddings(30)
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == VOCAB


@pytest.mark.parametrize("padding", [None, 2, 1, 0, VOCAB - 1], ids=["none", "eos", "bos", "first", "last"])
def test_every_token_is_learned(padding):
    """A token that also pads, where it stands for itself."""
    model = LightningForCausalLM(make_config(pad_token_id=padding, tie_word_embeddings=False))
    ids = torch.arange(VOCAB)[None]
    model(ids, labels=ids).loss.backward()
    assert (model.model.embed_tokens.weight.grad[:-1].abs().sum(dim=1) > 0).all()


def test_attributes_that_others_set_are_not_saved(model, tmp_path, caplog):
    model.config.made_up = 3
    model.save_pretrained(tmp_path)
    assert not hasattr(LightningConfig.from_pretrained(tmp_path), "made_up")
    assert model.config.made_up == 3


def test_a_model_without_a_head(model, tmp_path):
    model.model.save_pretrained(tmp_path)
    loaded = LightningModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens(1, 9))[0], model.model(tokens(1, 9))[0])


@pytest.mark.parametrize("preset", ["transnormer", "retnet"])
def test_decays_survive_meta_tensors(preset, tmp_path):
    """Built without memory, then filled: decays are no weights, and not in the file."""
    torch.manual_seed(0)
    model = LightningForCausalLM(make_config(decay_preset=preset)).eval()
    with torch.device("meta"):
        empty = LightningForCausalLM(model.config)
    empty = empty.to_empty(device="cpu").eval()
    empty.load_state_dict(model.state_dict())
    empty.tie_weights()
    for i, layer in enumerate(empty.model.layers):
        assert torch.equal(layer.attention.decay.log_decay, model.config.layer_log_decay(i))
    assert torch.equal(empty(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], ids=oct)
@pytest.mark.parametrize("shards", [1, 3], ids="{} files".format)
def test_weights_have_the_mode_of_the_other_files(model, tmp_path, umask, shards):
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path, max_shard_size="5GB" if shards == 1 else "12KB")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert sum(name.endswith(".safetensors") for name in modes) >= shards
    assert set(modes.values()) == {0o666 & ~umask}
