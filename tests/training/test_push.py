"""Runs that push their last checkpoint to the Hub, here one on localhost."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import WRITER, FakeHub, fake_hub
from training.runs import arguments, command, error_lines, options, torchrun

from lightning_attention.models.checkpoint import checkpoints


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as hub:
        yield hub


def check_pushed(hub: FakeHub, checkpoint: Path, name: str = "team/model") -> None:
    files = hub.repositories[name].files
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert not {"optimizer.pt", "run.json", "trainer_state.json"} & set(files)
    texts = [content.decode() for path, content in files.items() if not path.endswith(".safetensors")]
    assert not any(str(checkpoint.parents[1]) in text for text in texts)


def test_a_run_pushes_its_last_checkpoint(files: Path, hub: FakeHub) -> None:
    run = arguments(files, push_to_hub="team/model", hub_private=True, license="apache-2.0")
    result = command(*run, env=hub.environment(files))
    assert (result.returncode, result.stderr) == (0, "")
    assert f"pushed      {hub.url}/team/model" in result.stdout
    check_pushed(hub, files / "run" / "checkpoint-20")
    assert hub.repositories["team/model"].private
    assert "license: apache-2.0" in hub.repositories["team/model"].files["README.md"].decode()
    written = [path for path in (files / "run").rglob("*") if path.is_file()]
    assert not any(WRITER.encode() in path.read_bytes() for path in written)
    assert WRITER not in result.stdout


def test_a_failed_upload_keeps_the_run_and_says_how_to_push(files: Path, hub: FakeHub) -> None:
    hub.refused = "commit/main"
    result = command(*arguments(files, push_to_hub="team/model", license="mit"), env=hub.environment(files))
    assert result.returncode == 2
    (line,) = error_lines(result.stderr)
    assert "could not push" in line
    assert WRITER not in result.stdout + result.stderr
    assert len(checkpoints(files / "run")) == 2
    hub.refused = None
    later = shlex.split(line.partition("to push it later: ")[2])
    assert command(*later[1:], env=hub.environment(files)).returncode == 0
    check_pushed(hub, files / "run" / "checkpoint-20")
    assert "license: mit" in hub.repositories["team/model"].files["README.md"].decode()


def test_a_finished_run_pushes_when_it_resumes(files: Path, hub: FakeHub) -> None:
    assert command(*arguments(files)).returncode == 0
    resume = ["train", "--resume", "--output", files / "run", "--push-to-hub", "team/model"]
    result = command(*resume, env=hub.environment(files))
    assert result.returncode == 0, result.stderr
    check_pushed(hub, files / "run" / "checkpoint-20")


REFUSED: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "no token": ({}, None, None),
    "a wrong token": ({}, "hf_of_nobody", None),
    "no right to create": ({}, WRITER, "repos/create"),
    "no right to write": ({}, WRITER, "preupload"),
    "an unknown license": ({"license": "unknown-license"}, WRITER, None),
}


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "token", "refused"), REFUSED.values(), ids=REFUSED)
def test_a_run_that_must_not_push_does_not_start(files: Path, hub: FakeHub, changes, token, refused) -> None:
    hub.refused = refused
    run = arguments(files, push_to_hub="team/model", **changes)
    result = command(*run, env=hub.environment(files, token))
    assert result.returncode == 2
    assert len(error_lines(result.stderr)) == 1
    assert not (files / "run").exists()


def test_missing_data_create_no_repository(files: Path, hub: FakeHub) -> None:
    run = arguments(files, push_to_hub="team/model")
    (files / "data.txt").unlink()
    assert command(*run, env=hub.environment(files)).returncode == 2
    assert hub.repositories == {}


@pytest.mark.slow
def test_one_of_several_processes_pushes(files: Path, hub: FakeHub) -> None:
    process = torchrun(2, *arguments(files, push_to_hub="team/model"), where=hub.environment(files))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    check_pushed(hub, files / "run" / "checkpoint-20")
    assert sum("commit" in request for request in hub.requests) == 1
    assert sum("whoami" in request for request in hub.requests) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"push_to_hub": "a/b/c"}, "push_to_hub must be the name of a repository"),
        ({"push_to_hub": "team/mo del"}, "push_to_hub must be the name of a repository"),
        ({"push_to_hub": ""}, "push_to_hub must be the name of a repository"),
        ({"push_to_hub": "team/model", "hub_base_model": "team/"}, "hub_base_model must be the name of a repository"),
        ({"push_to_hub": "team/model", "license": "My own"}, "license must be an id of the Hub"),
        ({"hub_private": True}, "hub_private needs push_to_hub"),
        ({"hub_base_model": "team/base"}, "hub_base_model names the model of init_from"),
        (
            {"push_to_hub": "team/model", "init_from": "base", "lora_rank": 2, "config": None},
            "push_to_hub with lora_rank needs hub_base_model",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_options_that_contradict_each_other_are_refused(files: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(files, **changes)
