"""Runs that start from a checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import make_config, save_checkpoint
from training.runs import losses, options, quiet

from lightning_attention.cli import main
from lightning_attention.inference import load
from lightning_attention.models import LightningForCausalLM
from lightning_attention.training import TrainingOptions, train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def base(files: Path) -> Path:
    return save_checkpoint(files / "base" / "checkpoint-3")


def tuned(files: Path, name: str = "tuned", **changes: Any) -> TrainingOptions:
    return options(files, name, **{"config": None, "init_from": files / "base", "learning_rate": 1e-3} | changes)


def test_a_run_starts_from_weights_configuration_and_tokenizer(files: Path, base: Path) -> None:
    checkpoint = train(tuned(files, steps=1, learning_rate=1e-12, weight_decay=0.0), console=quiet())
    before, after = load_file(base / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-8)
    model, tokenizer = load(checkpoint)
    expected, its_tokenizer = load(base)
    assert model.config.hidden_size == expected.config.hidden_size
    assert tokenizer.get_vocab() == its_tokenizer.get_vocab()
    assert json.loads((files / "tuned" / "run.json").read_text())["init_from"] == str(base)


def test_it_learns_with_a_schedule_of_its_own(files: Path, base: Path) -> None:
    checkpoint = train(tuned(files, steps=40, learning_rate=1e-2), console=quiet())
    found = losses(files / "tuned")
    assert checkpoint.name == "checkpoint-40"
    assert found[40] < found[5] - 0.5


def test_it_resumes_without_the_first_checkpoint(files: Path, base: Path) -> None:
    train(tuned(files), console=quiet())
    expected = (files / "tuned" / "checkpoint-20" / "model.safetensors").read_bytes()
    shutil.rmtree(files / "tuned" / "checkpoint-20")
    shutil.rmtree(base)
    checkpoint = train(TrainingOptions.load(files / "tuned"), resume=True, console=quiet())
    assert (checkpoint / "model.safetensors").read_bytes() == expected


def test_a_resumed_run_cannot_take_another_start(files: Path, base: Path) -> None:
    train(tuned(files, steps=10), console=quiet())
    other = save_checkpoint(files / "other")
    with pytest.raises(ValueError, match=r"init_from was .*base.* cannot become .*other"):
        train(tuned(files, steps=20, init_from=other), resume=True, console=quiet())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "45M"}, "leave out size"),
        ({"config": "model.json"}, "leave out config"),
        ({"tokenizer": "tokenizer.json"}, "leave out tokenizer"),
        ({"attention": "softmax", "decay_preset": "retnet"}, "leave out attention, decay_preset"),
        ({"lora_alpha": 4.0}, "lora_alpha needs lora_rank"),
        ({"lora_dropout": 0.5}, "lora_dropout needs lora_rank"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "lora_alpha must be above 0"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1"),
        ({"lora_rank": 4, "fp8": True, "dtype": "auto"}, "does not go with fp8"),
        ({"lora_rank": 4, "lora_dropout": 0.1, "segment_length": 16}, "lora_dropout must be 0 with segment_length"),
        ({"lora_rank": 4, "init_from": None}, "lora_rank needs init_from"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_options_that_contradict_each_other_are_refused(files: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuned(files, **changes)


def test_the_command_refuses_options_of_the_model_even_with_their_default(files, monkeypatch, capsys) -> None:
    arguments = ["train", "--init-from", files / "base", "--tokenizer", "bytes", "--size", "demo"]
    monkeypatch.setattr("sys.argv", ["lightning-attention", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = "--init-from takes model and tokenizer from the checkpoint: leave out --size, --tokenizer"
    assert capsys.readouterr().err == f"lightning-attention: {error}\n"


def missing(folder: Path) -> None:
    shutil.rmtree(folder)


def another_kind(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.popitem()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def smaller_vocabulary(folder: Path) -> None:
    LightningForCausalLM(make_config(vocab_size=200)).save_pretrained(folder)


def few_positions(folder: Path) -> None:
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    config = make_config(vocab_size=259, linear_attention="cosformer", max_position_embeddings=32, **ids)
    LightningForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "init_from: no checkpoint in"),
        (another_kind, "model_type is 'llama'"),
        (without_weights, "is not a checkpoint"),
        (without_a_weight, "do not fit its config.json"),
        (without_tokenizer, "there is no file|is not a tokenizer"),
        (smaller_vocabulary, "token ids up to 258, and the model a vocabulary of 200"),
        (few_positions, "64 tokens exceed the 32 positions"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_unfit_checkpoint_is_refused_before_any_work(files: Path, base: Path, damage: Any, message: str) -> None:
    damage(base)
    with pytest.raises(ValueError, match=message):
        train(tuned(files), console=quiet())
    assert not (files / "tuned").exists()
