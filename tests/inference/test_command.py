"""`lightning-attention generate`, in this process and as a process of its own."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_model import save_checkpoint

from lightning_attention.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LINES = [{"prompt": f"prompt {i} é", "id": "\u20ac"} for i in range(6)]
GREEDY = ["--temperature", "0", "--max-new-tokens", "5"]
# The model's most likely tokens never end the text, sampled ones may.
ENDLESS = ["--temperature", "0", "--max-new-tokens", "1000000"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint-7")


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write_lines(tmp_path / "prompts.jsonl", *LINES)


def write_lines(path: Path, *lines: dict | str) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def read_lines(path: Path) -> dict[int, dict]:
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_index = {answer["index"]: answer for answer in answers}
    assert len(by_index) == len(answers)
    return by_index


@pytest.fixture
def run(monkeypatch, capsys, checkpoint):
    def run(*arguments: object, stdin: bytes | str = b"", checkpoint: Path = checkpoint) -> tuple[int, str, str]:
        """Run `generate`; return exit code, standard output and standard error."""
        defaults = ["--max-new-tokens", 5, *([] if "--temperature" in arguments else ["--temperature", 0])]
        given = ["generate", "--checkpoint", checkpoint, *defaults, *arguments]
        monkeypatch.setattr(sys, "argv", ["lightning-attention", *map(str, given)])
        text = io.StringIO(stdin) if isinstance(stdin, str) else io.TextIOWrapper(io.BytesIO(stdin), "ascii")
        monkeypatch.setattr(sys, "stdin", text)
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 0
        out, err = capsys.readouterr()
        return code, out, "".join(x for x in err.splitlines(keepends=True) if not x.startswith("[transformers]"))

    return run


@pytest.fixture
def complete(run, prompts, tmp_path) -> dict[int, dict]:
    """Answers to all prompts, in complete.jsonl."""
    assert run("--prompts", prompts, "--output", tmp_path / "complete.jsonl") == (0, "", "")
    return read_lines(tmp_path / "complete.jsonl")


def test_failed_lines_are_exit_code_1_and_one_line(run, tmp_path):
    lines = [LINES[0], "{", '{"prompt": "\\ud800", "\\ud800": 1}', "[" * 50_000, "", '{"prompt": "a", "seed": 1e400}']
    prompts, output = write_lines(tmp_path / "prompts.jsonl", *lines), tmp_path / "answers.jsonl"
    line = "4 of 5 lines could not be answered: their `error` says why\n"
    assert run("--prompts", prompts, "--output", output) == (1, "", line)
    answers = read_lines(output)
    assert {i: "error" in answer for i, answer in answers.items()} == {0: False, 1: True, 2: True, 3: True, 5: True}
    assert run("--prompts", prompts) == (1, output.read_text(encoding="utf-8"), line)


def test_a_rerun_continues_an_output_cut_off_anywhere(run, prompts, complete, tmp_path):
    content, output = (tmp_path / "complete.jsonl").read_bytes(), tmp_path / "answers.jsonl"
    ends = {0, 1, 5, 11, 30, len(content) - 1, len(content)}
    ends |= {i + d for i, byte in enumerate(content) if byte == ord("\n") for d in (0, 1, 2)} & {*range(len(content))}
    for end in sorted(ends):
        output.write_bytes(content[:end])
        assert run("--prompts", prompts, "--output", output)[0] == 0
        kept = content[: content[:end].rfind(b"\n") + 1]
        assert output.read_bytes().startswith(kept)
        assert read_lines(output) == complete


def test_known_answers_are_kept(run, prompts, complete, tmp_path):
    output = tmp_path / "answers.jsonl"
    changed = [answer | {"text": "as it was"} for answer in list(complete.values())[:-1]]
    write_lines(output, *changed)
    output.chmod(0o600)
    assert run("--prompts", prompts, "--output", output) == (0, "", "")
    last = list(complete)[-1]
    assert read_lines(output) == {answer["index"]: answer for answer in changed} | {last: complete[last]}
    assert output.stat().st_mode & 0o777 == 0o600


def test_failed_lines_are_answered_again(run, prompts, complete, tmp_path):
    output = write_lines(tmp_path / "answers.jsonl", {**LINES[2], "index": 2, "error": "out of memory"}, complete[0])
    assert run("--prompts", prompts, "--output", output) == (0, "", "")
    assert read_lines(output) == complete


def test_an_output_with_answers_to_other_prompts_is_refused(run, prompts, complete, tmp_path):
    output = tmp_path / "complete.jsonl"
    before = output.read_bytes()
    write_lines(prompts, *LINES[:3], {"prompt": "another"}, *LINES[4:])
    code, out, err = run("--prompts", prompts, "--output", output)
    assert (code, out) == (2, "")
    assert err == "lightning-attention: line 4 of the prompts is not the one that was answered before\n"
    assert output.read_bytes() == before


OTHER_FILES = {
    "safetensors": (b"\x10\0\0\0\0\0\0\0{}" + b"x" * 90, "holds no answers"),
    "JSON on many lines": (b'{\n  "version": "1.0"\n}\n', "other lines than answers, in line 1"),
    "JSON on one line": (b'{"version": "1.0", "index": 3}', "other lines than answers, in line 1"),
    "JSON lines": (b'{"text": "a document"}\n' * 3, "other lines than answers, in line 1"),
    "half JSON": (b'{"prompt": "a", "ind', "other lines than answers, in line 1"),
    "text": (b"To be or not to be\n", "holds no answers"),
    "answers and more": (b'{"index": 0, "prompt": "a", "error": "x"}\nnotes\n', "than answers, in line 2"),
    "answers and prompts": (b'{"index": 0, "error": "x"}\n{"prompt": "b"}\n', "than answers, in line 2"),
    "the same answer twice": (b'{"index": 0, "error": "x"}\n' * 2, "holds two answers of index 0"),
    "nested": (b'{"a":' * 50_000, "other lines than answers, in line 1"),
}


@pytest.mark.parametrize(("content", "message"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_files_without_answers_are_not_overwritten(run, prompts, tmp_path, content, message):
    output = tmp_path / "other"
    output.write_bytes(content)
    code, out, err = run("--prompts", prompts, "--output", output, checkpoint=tmp_path / "nowhere")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert output.read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {"other", "prompts.jsonl"}


def test_files_of_the_checkpoint_are_not_overwritten(run, prompts, checkpoint):
    for path in checkpoint.iterdir():
        before = path.read_bytes()
        code, _, err = run("--prompts", prompts, "--output", path)
        assert (code, "answers" in err) == (2, True)
        assert path.read_bytes() == before


PLACES = {
    "a folder": (".", "is a folder"),
    "no folder": ("none/answers.jsonl", "there is no folder"),
    "the prompts": ("prompts.jsonl", "--output would overwrite --prompts"),
    "a link to the prompts": ("link", "--output would overwrite --prompts"),
}


@pytest.mark.parametrize(("name", "message"), PLACES.values(), ids=PLACES)
def test_an_unusable_output_is_refused_before_loading(run, prompts, tmp_path, name, message):
    (tmp_path / "link").symlink_to(prompts)
    code, out, err = run("--prompts", prompts, "--output", tmp_path / name, checkpoint=tmp_path / "nowhere")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert prompts.read_text().count("prompt") == 12


def test_a_link_to_the_output_is_kept(run, prompts, complete, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "answers.jsonl")
    (tmp_path / "answers.jsonl").write_bytes((tmp_path / "complete.jsonl").read_bytes()[:-5])
    assert run("--prompts", prompts, "--output", tmp_path / "link") == (0, "", "")
    assert (tmp_path / "link").is_symlink()
    assert read_lines(tmp_path / "answers.jsonl") == complete


def test_prompts_from_a_fifo_and_standard_input(run, prompts, complete, tmp_path):
    content = prompts.read_bytes()
    os.mkfifo(tmp_path / "fifo")
    writer = threading.Thread(target=lambda: (tmp_path / "fifo").write_bytes(content))
    writer.start()
    outputs = [
        run("--prompts", tmp_path / "fifo"),
        run("--prompts", "-", stdin=content),
        run("--prompts", "-", stdin=content.decode()),
    ]
    writer.join()
    for code, out, err in outputs:
        assert (code, err) == (0, "")
        assert {answer["index"]: answer for answer in map(json.loads, out.splitlines())} == complete


def test_answers_to_a_fifo(run, prompts, complete, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_bytes()))
    reader.start()
    assert run("--prompts", prompts, "--output", tmp_path / "fifo") == (0, "", "")
    reader.join()
    assert {answer["index"]: answer for answer in map(json.loads, read[0].splitlines())} == complete


@pytest.fixture(scope="module")
def nan_checkpoint(checkpoint, tmp_path_factory) -> Path:
    folder = save_checkpoint(tmp_path_factory.mktemp("nan"))
    weights = load_file(folder / "model.safetensors")
    weights[next(name for name in weights if "mlp" in name)][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("temperature", [0, 1])
def test_nonfinite_weights_are_an_error(run, nan_checkpoint, prompts, temperature):
    message = "the model's logits are NaN or infinite"
    code, out, err = run("--temperature", temperature, "--prompt", "a", checkpoint=nan_checkpoint)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"lightning-attention: {message}")
    code, out, err = run("--temperature", temperature, "--prompts", prompts, checkpoint=nan_checkpoint)
    assert (code, err) == (1, "6 of 6 lines could not be answered: their `error` says why\n")
    assert all(message in json.loads(line)["error"] for line in out.splitlines())


BAD_INPUT = {
    "an argument that is not UTF-8": (["--prompt", "a\udcff"], b"", "--prompt is not UTF-8"),
    "standard input that is not UTF-8": ([], b"a\xff", "standard input is not UTF-8"),
    "a folder as prompts": (["--prompts", "."], b"", "Is a directory"),
    "temperature inf": (["--prompt", "a", "--temperature", "inf"], b"", "--temperature must be a finite number"),
}


@pytest.mark.parametrize(("arguments", "stdin", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_invalid_input_is_one_error_line(run, arguments, stdin, message):
    code, out, err = run(*arguments, stdin=stdin)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.fixture
def start(checkpoint) -> Iterator[Callable[..., "Process"]]:
    """Start processes, which are killed at the end of the test."""
    with ExitStack() as processes:
        yield lambda *arguments: processes.enter_context(Process(checkpoint, *arguments))


class Process(subprocess.Popen):
    """Process with the command, whose locale is not UTF-8."""

    def __init__(self, checkpoint: Path, *arguments: object):
        command = [sys.executable, "-m", "lightning_attention.cli", "generate", "--checkpoint", checkpoint, *arguments]
        latin = {"PYTHONIOENCODING": "latin-1", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
        pipe = subprocess.PIPE
        super().__init__(list(map(str, command)), stdin=pipe, stdout=pipe, stderr=pipe, env=os.environ | latin)

    def __exit__(self, *error) -> None:
        self.kill()
        super().__exit__(*error)

    def ended(self) -> tuple[int, str]:
        """Exit code and standard error."""
        assert self.stderr is not None
        err = self.stderr.read().decode()
        return self.wait(timeout=60), "".join(x for x in err.splitlines(True) if not x.startswith("[transformers]"))


@pytest.mark.slow
@pytest.mark.parametrize("as_argument", [True, False], ids=["an argument", "standard input"])
def test_text_is_utf_8_in_every_locale(start, as_argument):
    text = "naïve € 😀"
    process = start(*GREEDY, *(["--prompt", text] if as_argument else []))
    out, _ = process.communicate(None if as_argument else text.encode())
    assert process.returncode == 0
    assert out.decode("utf-8").startswith(text)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], [*GREEDY, "--prompts", "-"]], ids=["text", "answers"])
def test_a_reader_who_leaves_is_code_1_without_a_message(start, arguments):
    process = start(*(arguments or ENDLESS))
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"a" if not arguments else b'{"prompt": "a"}\n' * 3000)
    process.stdin.close()
    assert process.stdout.read(20)
    process.stdout.close()
    assert process.ended() == (1, "")


@pytest.mark.slow
def test_an_interruption_is_one_line(start):
    process = start("--prompt", "a", *ENDLESS)
    assert process.stdout is not None
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    assert process.ended() == (130, "lightning-attention: interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL], ids=lambda x: x.name)
def test_a_rerun_continues_after_an_interruption(start, tmp_path, run, stop):
    lines = [{"prompt": f"prompt {i}", "max_new_tokens": 1 + i} for i in range(300)]
    prompts, output = write_lines(tmp_path / "prompts.jsonl", *lines), tmp_path / "answers.jsonl"
    process = start("--temperature", 0, "--prompts", prompts, "--output", output, "--max-requests", 2)
    while process.poll() is None and not (output.exists() and output.read_bytes().count(b"\n") > 10):
        time.sleep(0.01)
    process.send_signal(stop)
    code, err = process.ended()
    if stop == signal.SIGINT:
        assert (code, err) == (130, f"lightning-attention: interrupted: the same command continues {output}\n")
    kept = output.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 10 < kept.count(b"\n") < 300
    assert run("--prompts", prompts, "--output", output) == (0, "", "")
    assert output.read_bytes().startswith(kept)
    assert run("--prompts", prompts, "--output", tmp_path / "complete.jsonl") == (0, "", "")
    assert read_lines(output) == read_lines(tmp_path / "complete.jsonl")


@pytest.mark.slow
def test_a_pipe_is_answered_line_by_line(start):
    process = start(*GREEDY, "--prompts", "/dev/stdin")
    assert process.stdin is not None
    assert process.stdout is not None
    for i in range(3):
        process.stdin.write(json.dumps({"prompt": "é", "id": i}).encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == i
    process.stdin.close()
    assert process.ended() == (0, "")
