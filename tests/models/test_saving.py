"""Saved models load with every weight, whichever way the model was changed before."""

import copy
import os
import stat
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_model import VOCAB, make_config, tokens
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

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
    """The head that PEFT's `modules_to_save=["lm_head"]` leaves after `merge_and_unload`."""
    head = copy.deepcopy(model.lm_head)
    head.weight.data += 1
    model.lm_head = head


def wrong_option(model):
    """Configure an untied head, although the head is tied."""
    model.config.tie_word_embeddings = False


CHANGES = [new_parameter, new_head, new_embedding, trained_copy, wrong_option]


@pytest.mark.parametrize("change", [*CHANGES, None], ids=lambda change: change.__name__ if change else "as built")
@pytest.mark.parametrize("gives_state_dict", [False, True], ids=["model", "state_dict"])
def test_loaded_equals_saved(model, change, gives_state_dict, tmp_path):
    if change:
        change(model)
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    state = {name: x.clone() for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path, **{"state_dict": state} if gives_state_dict else {})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != is_tied  # noqa: SIM118, not a dictionary
    loaded_with_report: Any = LightningForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded, report = loaded_with_report
    assert not any(report.values())
    assert torch.equal(loaded.eval()(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
    assert loaded.config.tie_word_embeddings == is_tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == is_tied
    loaded.save_pretrained(tmp_path / "again")
    again = LightningForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


def test_head_tied_after_building_is_saved_once(tmp_path):
    model = LightningForCausalLM(make_config(tie_word_embeddings=False)).eval()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = LightningForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


def test_auto_classes_load_saved_models(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LightningForCausalLM
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is LightningModel
    assert torch.equal(loaded(tokens(1, 9))[0], model.model(tokens(1, 9))[0])


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("size", [VOCAB + 6, 20])
def test_resized_vocabulary_keeps_logits_and_loads(is_tied, size, tmp_path):
    model = LightningForCausalLM(make_config(tie_word_embeddings=is_tied)).eval()
    ids = tokens(1, 9) % 20
    before = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    after, kept = model(ids).logits, min(size, VOCAB)
    assert after.shape[-1] == size
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    model.save_pretrained(tmp_path)
    loaded = LightningForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.vocab_size == size
    assert torch.equal(loaded(ids).logits, after)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == is_tied


@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id", "bos_token_id"])
def test_vocabulary_without_its_special_tokens_is_refused(name):
    model = LightningForCausalLM(make_config(**{name: 40}))
    with pytest.raises(ValueError, match=rf"{name} must be None or in \[0, vocab_size = 30\), got 40"):
        model.resize_token_embeddings(30)
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == VOCAB


@pytest.mark.parametrize("padding", [None, 2, 1, 0, VOCAB - 1], ids=["none", "eos", "bos", "first", "last"])
def test_padding_token_is_learned(padding):
    """Outside of padding, where the token stands for itself."""
    model = LightningForCausalLM(make_config(pad_token_id=padding, tie_word_embeddings=False))
    ids = torch.arange(VOCAB)[None]
    model(ids, labels=ids).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert gradient[:-1].any(dim=1).all()


def test_unknown_attributes_are_not_saved(model, tmp_path, caplog):
    model.config.made_up = 3
    model.save_pretrained(tmp_path)
    assert not hasattr(LightningConfig.from_pretrained(tmp_path), "made_up")
    assert model.config.made_up == 3


def test_base_model_loads(model, tmp_path):
    model.model.save_pretrained(tmp_path)
    loaded = LightningModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens(1, 9))[0], model.model(tokens(1, 9))[0])


@pytest.mark.parametrize("preset", ["transnormer", "retnet"])
def test_model_on_meta_gets_its_decays(preset):
    """`to_empty` restores decays, which are not in the state dictionary."""
    torch.manual_seed(0)
    model = LightningForCausalLM(make_config(decay_preset=preset)).eval()
    with torch.device("meta"):
        empty = LightningForCausalLM(model.config)
    empty = empty.to_empty(device="cpu").eval()
    empty.load_state_dict(model.state_dict())
    empty.tie_weights()
    for i in range(3):
        log_decay = empty.get_buffer(f"model.layers.{i}.attention.decay.log_decay")
        assert torch.equal(log_decay, model.config.layer_log_decay(i))
    assert torch.equal(empty(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], ids=oct)
@pytest.mark.parametrize("shards", [1, 3], ids="{} files".format)
def test_weights_have_the_file_mode_of_the_configuration(model, tmp_path, umask, shards):
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path, max_shard_size="5GB" if shards == 1 else "12KB")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert sum(name.endswith(".safetensors") for name in modes) >= shards
    assert set(modes.values()) == {0o666 & ~umask}


def test_a_head_without_a_weight_of_its_own_is_saved(model, tmp_path):
    model.lm_head = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, VOCAB))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[f"lm_head.{name}"], weight) for name, weight in model.lm_head.state_dict().items())


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_special_tokens_out_of_range_are_refused_when_they_are_set(model, token):
    with pytest.raises(ValueError, match=f"pad_token_id must be None or in .*got {token}.*resize_token_embeddings"):
        model.config.pad_token_id = token
    model.resize_token_embeddings(VOCAB + 1)
    model.config.pad_token_id = VOCAB
