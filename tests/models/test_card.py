"""Model cards say what the files of a checkpoint say, without paths of the machine, and their snippets run."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_model import make_config, save_checkpoint
from training.runs import TEXT, options, quiet, write_inputs

from lightning_attention.cli import main
from lightning_attention.models import LightningForCausalLM
from lightning_attention.models.card import README, metadata, model_card, write_card
from lightning_attention.training import TrainingOptions, train
from lightning_attention.training.folder import check_checksums
from lightning_attention.training.metrics import read_metrics


def rows(card: ModelCard) -> dict[str, str]:
    """Cells of the tables of two columns."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, re.M))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("someones-secret-folder")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(files: Path) -> Path:
    return train(options(files, license="apache-2.0"), console=quiet())


def test_a_checkpoint_has_a_card_with_its_size_and_losses(files: Path, checkpoint: Path) -> None:
    card, found = ModelCard.load(checkpoint / README), rows(ModelCard.load(checkpoint / README))
    records = read_metrics(files / "run" / "metrics.jsonl")
    held_out = [record for record in records if "eval_loss" in record][-1]
    count = sum(x.numel() for x in load_file(checkpoint / "model.safetensors").values())
    assert (found["parameters"], found["layers"], found["width"]) == (f"{count:,}", "2", "24")
    assert found["data"].startswith("`data.txt`: 1 document, ")
    assert (found["tokens read"], found["steps"]) == ("2,560", "20 of 2 sequences of 64 tokens")
    assert f"| held-out text, 512 tokens | {held_out['eval_loss']:.4f} |" in card.text
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert (data["license"], data["tags"][0]) == ("apache-2.0", "lightning-attention")
    assert [x.metric_value for x in metadata(card).eval_results or ()] == [
        round(held_out["eval_loss"], 4),
        round(held_out["eval_bits_per_byte"], 4),
    ]


def test_every_checkpoint_has_its_own_losses(files: Path, checkpoint: Path) -> None:
    records = read_metrics(files / "run" / "metrics.jsonl")
    for step in (10, 20):
        loss = next(x["eval_loss"] for x in records if x["step"] == step and "eval_loss" in x)
        assert f"{loss:.4f}" in (files / "run" / f"checkpoint-{step}" / README).read_text()


def test_no_path_of_the_machine_is_in_it(files: Path, checkpoint: Path) -> None:
    tuned = train(options(files, "tuned", config=None, init_from=checkpoint, steps=10), console=quiet())
    for folder in (checkpoint, tuned):
        assert "secret" not in (folder / README).read_text()
    assert "fine-tuned from `run/checkpoint-20`" in (tuned / README).read_text()


def test_text_of_its_own_to_validate_on_is_named(files: Path) -> None:
    (files / "valid.txt").write_text(TEXT[:4000])
    run = options(files, "validated", validation=(files / "valid.txt",), steps=10)
    card = ModelCard.load(train(run, console=quiet()) / README)
    assert rows(card)["held-out text"].startswith("`valid.txt`: ")
    assert [result.dataset_name for result in metadata(card).eval_results or ()] == ["valid.txt"] * 2


def test_its_snippets_run_in_its_folder(checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(checkpoint)
    blocks = re.findall(r"^```(python|bash)\n(.*?)^```$", (checkpoint / README).read_text(), re.M | re.S)
    assert [language for language, _ in blocks] == ["bash", "python", "python", "bash"]
    for language, code in blocks[1:]:
        if language == "python":
            exec(compile(code, README, "exec"), {"__name__": "__main__"})
        else:
            monkeypatch.setattr("sys.argv", shlex.split(code))
            with pytest.raises(SystemExit) as stopped:
                main()
            assert not stopped.value.code
    assert capsys.readouterr().out.count("Once") == 2  # the engine prints answers alone


def test_a_card_may_be_edited(files: Path, checkpoint: Path) -> None:
    """A checkpoint with an edited card is intact, and the run resumes from it."""
    (checkpoint / README).write_text("mine")
    check_checksums(checkpoint)
    write_card(checkpoint)
    assert (checkpoint / README).read_text() == "mine"
    train(TrainingOptions.load(files / "run"), resume=True, console=quiet())
    assert (checkpoint / README).read_text() == "mine"


ODD_NAMES = {"bars": "a|b`c.txt", "newline": "a\nb.txt", "not UTF-8": "\udcff.txt", "umlaut": "ä 語.txt"}


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_odd_names_of_data_leave_the_card_intact(files: Path, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TEXT)
    (tmp_path / "model.json").write_text((files / "model.json").read_text())
    run = replace(options(tmp_path, steps=1, eval_every=1, save_every=1), data=(tmp_path / name,))
    checkpoint = train(run, console=quiet())
    card = ModelCard.load(checkpoint / README)
    assert rows(card)["steps"].startswith("1 of 2")
    assert len(re.findall(r"^\| data \|", card.text, re.M)) == 1


def test_a_model_without_a_run_has_a_card_without_claims(tmp_path: Path) -> None:
    card = model_card(save_checkpoint(tmp_path / "saved"))
    assert "eval_results" not in card.data.to_dict()
    assert "## Training" not in card.text
    assert "## Losses" not in card.text
    assert rows(card)["layers"] == "3"


def test_losses_of_another_step_are_not_claimed(tmp_path: Path, files: Path) -> None:
    checkpoint = train(options(files, "unevaluated", steps=15, save_every=15), console=quiet())
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    evaluated = {x["step"] for x in state["log_history"] if "eval_loss" in x}
    assert ("held-out text, " in (checkpoint / README).read_text()) == (15 in evaluated)


ATTENTIONS = {
    "lightning": ({}, "lightning in 3 layers"),
    "hybrid": ({"layer_pattern": "2:1"}, "lightning in 2 layers, softmax in 1 layer"),
    "softmax": ({"layer_types": ["full_attention"] * 3}, "softmax in 3 layers"),
}


@pytest.mark.parametrize(("changes", "words"), ATTENTIONS.values(), ids=ATTENTIONS)
def test_the_attention_is_named(tmp_path: Path, changes: dict, words: str) -> None:
    LightningForCausalLM(make_config(**changes)).save_pretrained(tmp_path)
    assert rows(model_card(tmp_path))["attention"] == words
