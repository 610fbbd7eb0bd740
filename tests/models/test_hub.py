"""Pushes to a Hub on localhost: what is uploaded, what is refused before, and that it loads from there."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import READER, USER, WRITER, FakeHub, Repository, fake_hub
from huggingface_hub import ModelCard, constants
from tiny_model import save_checkpoint

from lightning_attention.cli import main
from lightning_attention.models.card import metadata
from lightning_attention.models.hub import push
from lightning_attention.models.remote_code import MODULE

# Of huggingface_hub 2.4 about its use of httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
FILES = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", f"{MODULE}.py",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
# Of a training run, or of the user, in the folder of a checkpoint.
STATE = "optimizer.pt", "run.json", "trainer_state.json", "rng_state.pth", "training_args.bin", "notes.txt", "evil.py"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub that this process uses, with the token of a user who may write."""
    with fake_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield hub


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = save_checkpoint(tmp_path / "run" / "checkpoint-5")
    for name in STATE:
        (folder / name).write_text("{}")
    return folder


def test_a_model_is_uploaded_without_the_state_of_its_training(hub: FakeHub, checkpoint: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert push(checkpoint.parent, "team/model", license="mit") == f"{hub.url}/team/model"
    files = hub.repositories["team/model"].files
    assert set(files) == FILES
    for name in ("model.safetensors", "tokenizer.json"):
        assert files[name] == (checkpoint / name).read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert (metadata(card).license, card.text.strip().partition("\n")[0]) == ("mit", "# team/model")
    assert 'from_pretrained("team/model", trust_remote_code=True)' in card.text
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("module", ["transformers", "lightning_attention.models"])
def test_it_loads_from_there_in_a_new_process(hub: FakeHub, checkpoint: Path, tmp_path: Path, module: str) -> None:
    push(checkpoint, "team/model")
    trust = ", trust_remote_code=True" if module == "transformers" else ""
    script = f"""
import {module}, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("team/model"{trust})
tokenizer = AutoTokenizer.from_pretrained("team/model"{trust})
from lightning_attention.inference import load
local, _ = load({str(checkpoint)!r})
ids = tokenizer("ab", return_tensors="pt").input_ids
assert ids.tolist() == [[256, 97, 98]]
assert torch.equal(model(ids).logits, local(ids).logits)
"""
    environment = hub.environment(tmp_path)
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_snippets_of_its_card_run(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    push(checkpoint, "team/model")
    text = hub.repositories["team/model"].files["README.md"].decode()
    (tmp_path / "elsewhere").mkdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = hub.environment(tmp_path) | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    blocks = re.findall(r"^```(python|bash)\n(.*?)^```$", text, re.M | re.S)
    assert [language for language, _ in blocks] == ["bash", "python", "bash", "python", "bash"]
    for language, code in blocks[1:]:  # the first installs the library
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
        result = subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_a_name_alone_is_a_repository_of_the_user(hub: FakeHub, checkpoint: Path) -> None:
    assert push(checkpoint, "model", private=True) == f"{hub.url}/{USER}/model"
    assert hub.repositories[f"{USER}/model"].private


def test_a_second_push_replaces_the_model_of_the_first(hub: FakeHub, checkpoint: Path) -> None:
    stale = {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b"{}", "adapter_config.json": b""}
    hub.repositories["team/model"] = Repository(files={"picture.png": b"p", **stale})
    push(checkpoint, "team/model")
    push(checkpoint, "team/model")
    assert set(hub.repositories["team/model"].files) == FILES | {"picture.png"}


def test_a_card_of_the_user_is_pushed_as_it_is(hub: FakeHub, checkpoint: Path) -> None:
    for text in ("---\nlicense: mit\ntags:\n- poems\n---\n# Mine\n", "# Without metadata\n"):
        (checkpoint / "README.md").write_text(text)
        push(checkpoint, "team/model")
        assert hub.repositories["team/model"].files["README.md"].decode() == text


def no_token(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def wrong_token(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")


def reading_token(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)


def offline(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def refused_creation(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refused = "repos/create"


def read_only_repository(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["team/model"], hub.refused = Repository(), "preupload"


def public_repository(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["team/model"] = Repository()


def damaged_weights(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"x")


def damaged_card(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint / "README.md").write_text("---\n- [\n---\n")


def no_tokenizer(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint / "tokenizer.json").unlink()


def nothing(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pass


REFUSALS = [
    (no_token, [], "no token of the Hugging Face Hub"),
    (wrong_token, [], "does not tell whose token this is: Invalid user token"),
    (reading_token, [], "the token of someone may only read"),
    (offline, [], "the Hub at http://127.0.0.1:9 does not tell"),
    (refused_creation, [], "cannot create team/model"),
    (read_only_repository, [], "or write to it: .*403 Forbidden"),
    (public_repository, ["--private"], "exists on the Hub and is public"),
    (damaged_weights, [], "is not a checkpoint"),
    (damaged_card, [], "README.md is not a model card"),
    (no_tokenizer, [], "holds no tokenizer"),
    (nothing, ["--license", "unknown-license"], "does not take the license 'unknown-license'"),
    (nothing, ["--base-model", "team/nothing"], "the Hub has no base model team/nothing"),
    (nothing, ["--base-model", "a/b/c"], "base_model must be the name of a repository"),
]


@pytest.mark.parametrize(("arrange", "options", "message"), REFUSALS, ids=lambda x: getattr(x, "__name__", None))
def test_a_refusal_is_one_line_and_uploads_nothing(
    hub: FakeHub, checkpoint: Path, monkeypatch, capsys, arrange: Callable, options: list[str], message: str
) -> None:
    arrange(hub, checkpoint, monkeypatch)
    monkeypatch.setattr("sys.argv", ["lightning-attention", "push", str(checkpoint), "team/model", *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.out) == (2, "")
    assert re.fullmatch(rf"lightning-attention: .*{message}.*\n", printed.err), printed.err
    assert not any(repository.files for repository in hub.repositories.values())
    assert not any(token in printed.err for token in (WRITER, READER, "hf_of_nobody"))


def test_adapters_need_the_name_of_their_base_model(hub: FakeHub, checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match=r"holds LoRA adapters: give the name of their base model on the Hub"):
        push(checkpoint, "team/adapters")
    assert hub.requests == []
