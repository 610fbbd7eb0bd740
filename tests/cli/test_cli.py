"""Commands in this process."""

import inspect
import io
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import save_checkpoint

from lightning_attention.cli import main
from lightning_attention.cli.train import train as train_command
from lightning_attention.inference import load
from lightning_attention.training import TrainingOptions
from lightning_attention.training.options import MAY_CHANGE

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def run(monkeypatch, capsys, *arguments: object, stdin: str = "") -> tuple[int, str, str]:
    """Run a command; return exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["lightning-attention", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    try:
        main()
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 0
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint-7")


def test_train_writes_a_run_that_generate_loads(monkeypatch, capsys, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("to be or not to be, " * 200)
    (tmp_path / "model.json").write_text(
        json.dumps({"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2})
    )
    arguments = [
        "train",
        "--output",
        tmp_path / "run",
        "--data",
        tmp_path / "data",
        "--config",
        tmp_path / "model.json",
    ]
    arguments += ["--sequence-length", 32, "--batch-size", 4, "--steps", 6, "--log-every", 2, "--learning-rate", 0.01]
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0
    assert "tokens/s" in out
    assert f"checkpoint  {tmp_path / 'run' / 'checkpoint-6'}" in out
    code, out, _ = run(
        monkeypatch, capsys, "generate", "--checkpoint", tmp_path / "run", "--prompt", "to be", "--max-new-tokens", 8
    )
    assert code == 0
    assert out.startswith("to be")
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert (code, err) == (
        2,
        f"lightning-attention: {tmp_path / 'run'} holds a run already: resume it, or choose another output\n",
    )


def test_generate_prints_the_tokens_of_the_model(monkeypatch, capsys, checkpoint):
    model, tokenizer = load(checkpoint)
    ids = torch.tensor([[256, *b"hello"]])
    new_tokens = model.generate(ids.to(model.device), max_new_tokens=20, do_sample=False)[0, 6:]
    arguments = ["generate", "--checkpoint", checkpoint, "--max-new-tokens", 20, "--temperature", 0]
    expected = f"hello{tokenizer.decode(new_tokens, skip_special_tokens=True)}\n"
    assert run(monkeypatch, capsys, *arguments, "--prompt", "hello")[:2] == (0, expected)
    assert run(monkeypatch, capsys, *arguments, stdin="hello")[:2] == (0, expected)


def test_generate_answers_a_file_of_prompts(monkeypatch, capsys, checkpoint, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "hello", "temperature": 0, "max_new_tokens": 20}\n\n{"prompt": 3}\n')
    arguments = ["generate", "--checkpoint", checkpoint]
    code, expected, _ = run(
        monkeypatch, capsys, *arguments, "--prompt", "hello", "--max-new-tokens", 20, "--temperature", 0
    )
    assert code == 0
    code, out, err = run(monkeypatch, capsys, *arguments, "--prompts", prompts, "--output", output)
    assert (code, out) == (1, "")
    assert "1 of 2 lines could not be answered" in err
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    by_index = {answer["index"]: answer for answer in answers}
    assert "hello" + by_index[0]["text"] + "\n" == expected
    assert by_index[2]["error"] == "a line must be a JSON object with a text prompt"
    code, out, _ = run(monkeypatch, capsys, *arguments, "--prompts", prompts)
    assert [json.loads(line) for line in out.splitlines()] == answers


def broken(checkpoint: Path, folder: Path, how: str) -> Path:
    """Copy a checkpoint and damage it."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "another shape":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 48}))
    elif how == "more layers":
        change = {"num_hidden_layers": 4, "layer_types": None}
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    elif how == "an extra weight":
        save_file(load_file(weights) | {"model.layers.9.x": torch.zeros(1)}, weights, metadata={"format": "pt"})
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no weights":
        weights.unlink()
    elif how == "pickled weights":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif how == "a bad preset":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"decay_preset": "fast"}))
    elif how == "bad json":
        config.write_text("{")
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("another shape", "do not fit its config.json: mismatched"),
        ("more layers", "do not fit its config.json: missing"),
        ("an extra weight", "do not fit its config.json: unexpected model.layers.9.x"),
        ("cut weights", "is not a checkpoint"),
        ("no weights", "is not a checkpoint"),
        ("pickled weights", "is not a checkpoint"),
        ("no tokenizer", "holds no tokenizer"),
        ("a bad preset", "decay_preset must be one of"),
        ("bad json", "is not a checkpoint"),
    ],
)
def test_a_broken_checkpoint_is_one_error_line(monkeypatch, capsys, tmp_path, checkpoint, how, message):
    folder = broken(checkpoint, tmp_path / "broken", how)
    code, out, err = run(monkeypatch, capsys, "generate", "--checkpoint", folder, "--prompt", "a")
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("lightning-attention:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "Missing option '--checkpoint'."),
        (["generate", "--checkpoint", "nowhere"], "no checkpoint in nowhere"),
        (["generate", "--checkpoint", "nowhere", "--temperature", "-1"], "temperature must be at least 0, got -1.0"),
        (["generate", "--checkpoint", "nowhere", "--top-p", "0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["generate", "--checkpoint", "nowhere", "--top-k", "-1"], "top_k must be at least 0, got -1"),
        (["generate", "--checkpoint", "nowhere", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["train", "--data", "nowhere"], "there is no file or folder nowhere"),
        (["train", "--data", "../empty.txt"], "the data holds no text"),
        (["train", "--data", "../bad.jsonl"], "bad.jsonl, line 1: not a JSON object with a text in 'text'"),
        (["train", "--sequence-length", "0"], "sequence_length must be at least 2, got 0"),
        (["train", "--steps", "many"], "Invalid value for '--steps'"),
        (["train", "--decay-preset", "fast"], "decay_preset must be one of"),
        (["train", "--size", "1B", "--config", "x.json"], "give --size or --config, not both"),
        (["train", "--resume"], "no run to resume in run"),
        (["train", "--resume", "--seed", "9", "--steps", "9"], "leave out --seed"),
        (["train", "--validation", "a", "--held-out", "0.1"], "give --validation or --held-out, not both"),
        (["train", "--schedule", "linear"], "schedule must be one of 'cosine', 'wsd', 'constant', got 'linear'"),
        (["generate", "--checkpoint", "x", "--prompt", "a", "--prompts", "b"], "give --prompt or --prompts, not both"),
        (["generate", "--checkpoint", "x", "--output", "b"], "--output needs --prompts"),
        (["generate", "--checkpoint", "x", "--prompt", "a", "--max-requests", "64"], "--max-requests needs --prompts"),
        (
            ["generate", "--checkpoint", "x", "--prefix-slots", "-1", "--max-requests", "0"],
            "--max-requests, --prefix-slots need --prompts",
        ),
        (["generate", "--checkpoint", "x", "--prompts", "../none.jsonl"], "No such file or directory"),
        (["generate", "--checkpoint", "x", "--prompts", "../bad.jsonl"], "no checkpoint in x"),
        (
            ["generate", "--checkpoint", "x", "--prompts", "../bad.jsonl", "--output", "../bad.jsonl"],
            "--output would overwrite --prompts",
        ),
        (["fly"], "No such command 'fly'."),
        (["train", "--wings"], "No such option: --wings"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_input_is_one_error_line_and_writes_no_file(monkeypatch, capsys, tmp_path, arguments, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.jsonl").write_text("{}\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("lightning-attention: ")
    assert err.count("\n") == 1
    assert message in err
    assert list((tmp_path / "here").iterdir()) == []


def test_a_run_is_extended_and_its_best_checkpoint_loads(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text("to be or not to be, " * 200)
    Path("valid.txt").write_text("to be and to be, " * 20)
    model = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    Path("model.json").write_text(json.dumps(model))
    arguments = ["--data", "data.txt", "--validation", "valid.txt", "--config", "model.json", "--sequence-length", 32]
    arguments += ["--steps", 4, "--schedule", "wsd", "--eval-every", 2, "--batch-size", 2]
    code, out, err = run(monkeypatch, capsys, "train", *arguments)
    assert (code, "validation: 342 tokens of 1 documents" in out) == (0, True), err
    changes = ["--steps", 8, "--schedule", "constant", "--keep-best", "--batch-size", 1]
    code, out, err = run(monkeypatch, capsys, "train", "--resume", *changes)
    assert code == 0, err
    for line in (
        "steps 4 is now 8",
        "schedule wsd is now constant",
        "accumulate 1 is now 2",
        "keep_best False is now True",
    ):
        assert line in out
    code, out, err = run(
        monkeypatch, capsys, "generate", "--checkpoint", "run/best", "--prompt", "to", "--max-new-tokens", 2
    )
    assert (code, out.startswith("to")) == (0, True), err
    code, _, err = run(monkeypatch, capsys, "train", "--resume", "--steps", 3)
    assert code == 2
    assert err.splitlines()[-1].endswith("checkpoint-8 is of a later step than steps: give at least 8, got 3")


def test_the_options_that_may_change_are_those_of_the_guide():
    guide = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    table = guide.partition("## Resuming with other options")[2].partition("Any other change is refused")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `--")]
    named = {name for row in rows for name in re.findall("`--([a-z0-9-]+)`", row)}
    assert named == {name.replace("_", "-") for name in MAY_CHANGE - {"output"}}


def test_train_has_the_defaults_of_training_options():
    command = inspect.signature(train_command).parameters
    for field in fields(TrainingOptions):
        if field.name not in ("output", "data", "validation", "report_to"):
            assert command[field.name].default == field.default, field.name


def test_an_interrupted_command_exits_with_130(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_attention.cli.info.Console", interrupted)
    assert run(monkeypatch, capsys, "info")[0] == 130


def test_info_shows_versions_and_backends(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "info")
    assert code == 0
    for expected in ("torch", torch.__version__.split("+")[0], "chunked", "reference", "cpu", "yes"):
        assert expected in out


IMPORTS = """
import sys
from lightning_attention.cli import main
try:
    main()
except SystemExit as exit:
    assert not exit.code
print(*(name for name in ("torch._dynamo", "transformers", "matplotlib") if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["generate", "--help"],
        ["serve", "--help"],
        ["compare", "--help"],
        ["info"],
    ],
    ids=lambda arguments: " ".join(arguments) or "no command",
)
def test_help_and_info_import_neither_compiler_nor_transformers(arguments):
    process = subprocess.run([sys.executable, "-c", IMPORTS, *arguments], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "\n")
    assert process.stdout


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    code, _, err = run(monkeypatch, capsys, "info")
    assert (code, err) == (2, "lightning-attention: typer not installed: run pip install 'lightning-attention[cli]'\n")
