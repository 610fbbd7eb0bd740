"""Faulty invocations of every command, and the files that they name."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from tiny_model import save_checkpoint

HUGE, BEYOND_64_BITS, NO_NUMBERS = str(10**15), "1" + 30 * "0", ("", "many", "1e400", "--steps", "²")
TRAIN = ["train", "--data", "text.txt", "--config", "model.json", "--sequence-length", "16", "--batch-size", "2"]
TRAIN += ["--steps", "1", "--output", "new"]
GENERATE = ["generate", "--checkpoint", "checkpoint", "--prompt", "a", "--max-new-tokens", "2"]
LINES = ["generate", "--checkpoint", "checkpoint", "--prompts", "prompts.jsonl"]

MODEL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
DEEP = 60_000 * "[" + 60_000 * "]"
BAD_JSON = {
    "empty": b"",
    "binary": bytes(range(256)) * 4,
    "list": b"[1]",
    "number": b"3",
    "null": b"null",
    "text": b'"text"',
    "cut": b'{"hidden_size": 1',
    "deep": DEEP.encode(),
    "deep-value": f'{{"hidden_size": {DEEP}}}'.encode(),
    "long-number": b'{"hidden_size": ' + 5000 * b"9" + b"}",
}
BAD_MODELS = {
    "unknown": {"wings": 2},
    "float-size": {"hidden_size": 16.5},
    "text-size": {"hidden_size": "16"},
    "null-size": {"hidden_size": None},
    "list-size": {"hidden_size": [16]},
    "negative-size": {"hidden_size": -16},
    "no-layers": {"num_hidden_layers": 0},
    "indivisible": {"hidden_size": 15},
    "object-heads": {"num_attention_heads": {}},
    "bad-decay": {"log_decay": 3},
    "text-decay": {"log_decay": [["a", "b"]]},
    "rising-decay": {"log_decay": [[1.0, 1.0]]},
    "nan-eps": {"norm_eps": float("nan")},
    "text-eps": {"norm_eps": "small"},
    "bad-layer-types": {"layer_types": 3},
    "encoder": {"is_encoder_decoder": True},
    "unknown-dtype": {"dtype": "foo"},
    "list-dtype": {"dtype": ["float32"]},
    "attention-weights": {"output_attentions": True},
    "another-model": {"model_type": "llama"},
    "huge-size": {"hidden_size": 2 * 10**9, "intermediate_size": 10**9},
    "beyond-64-bits": {"hidden_size": 2 * 10**30},
    "huge-mlp": {"intermediate_size": 10**14},
}
BAD_CHATS = {
    "no-answer": [{"role": "user", "content": "a"}],
    "null": [{"role": "assistant", "content": None}],
    "parts": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
    "tool": [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "a"}],
    "no-role": [{"content": "a"}],
    "list-role": [{"role": ["assistant"], "content": "a"}],
    "more-fields": [{"role": "assistant", "content": "a", "weight": 0}],
    "texts": ["a", "b"],
    "empty": [],
    "object": {"role": "assistant", "content": "a"},
    "text": "a",
    "number": 3,
}
BAD_RUNS = {
    "unknown": {"wings": 2},
    "text-steps": {"steps": "many"},
    "null-steps": {"steps": None},
    "negative-steps": {"steps": -1},
    "number-data": {"data": 3},
    "list-tokenizer": {"tokenizer": []},
    "no-corpus": {},
}


def files(folder: Path) -> Path:
    """Create the files that the invocations name."""
    text = "to be or not to be, that is the question. " * 40
    (folder / "text.txt").write_text(text)
    (folder / "short.txt").write_text("a")
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("façade ".encode("latin-1") * 9)
    (folder / "binary.bin").write_bytes(bytes(range(256)) * 4)
    (folder / "folder").mkdir()
    (folder / "folder" / "mine.txt").write_text("of the user")
    (folder / "bare").mkdir()
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "lines.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (folder / "bad.jinja").write_text("{% for")
    for name, messages in BAD_CHATS.items():
        (folder / f"chat-{name}.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (folder / "prompts.jsonl").write_text('{"prompt": "a", "max_new_tokens": 2}\n')
    (folder / "gone").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    for name, content in BAD_JSON.items():
        (folder / f"{name}.json").write_bytes(content)
        (folder / f"{name}.jsonl").write_bytes(content + b"\n")
        (folder / f"run-{name}").mkdir()
        (folder / f"run-{name}" / "run.json").write_bytes(content)
    for name, options in BAD_MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(MODEL | options))
    for name, options in BAD_RUNS.items():
        (folder / f"run-{name}").mkdir(exist_ok=True)
        (folder / f"run-{name}" / "run.json").write_text(json.dumps(options))
    _checkpoints(folder)
    return folder


def _checkpoints(folder: Path) -> None:
    def copy(name: str) -> Path:
        (folder / name).mkdir()
        for file in good.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
        return folder / name

    good = save_checkpoint(folder / "checkpoint")
    config = json.loads((good / "config.json").read_text())
    for name, content in BAD_JSON.items():
        for file in ("config", "tokenizer", "tokenizer_config", "generation_config"):
            (copy(f"{file}-{name}") / f"{file}.json").write_bytes(content)
        (copy(f"weights-{name}") / "model.safetensors").write_bytes(content)
    for name, options in BAD_MODELS.items():
        (copy(f"model-{name}") / "config.json").write_text(json.dumps(config | options))
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        path = copy(f"folder-{file}") / file
        path.unlink()
        path.mkdir()
    (folder / "odd-run" / "checkpoint-²").mkdir(parents=True)
    (folder / "odd-run" / "checkpoint-5").touch()
    path = copy("weights-huge-header") / "model.safetensors"
    path.write_bytes(b"\xff" * 7 + b"\x7f" + path.read_bytes()[8:])


def _numbers(command: list[str], option: str, *values: str, is_whole: bool = True) -> Iterator[list[str]]:
    """Yield a command with values that are no numbers, and with `values`, for a numeric option."""
    others = (BEYOND_64_BITS, "-" + BEYOND_64_BITS, "1.5") if is_whole else ()
    command = _without(command, option)
    for value in dict.fromkeys(("nan", "inf", "-inf", *NO_NUMBERS, *others, *values)):
        yield [*command, option, value]


def _without(command: list[str], option: str) -> list[str]:
    if option not in command:
        return command
    at = command.index(option)
    return command[:at] + command[at + 2 :]


def _with(command: list[str], option: str, *values: str) -> Iterator[list[str]]:
    return ([*_without(command, option), option, value] for value in values)


UNWRITABLE = [
    "text.txt",
    "text.txt/new",
    "/proc/new",
    "/dev/full/new",
    "/dev/null",
    300 * "a",
    "loop/new",
    "gone/a/../..",
]


def numbers() -> Iterator[list[str]]:
    for name in ("batch-size", "sequence-parallel", "accumulate", "steps", "eval-tokens", "log-every", "eval-every"):
        yield from _numbers(TRAIN, f"--{name}", "0", "-1")
    yield from _numbers(TRAIN, "--save-every", "0", "-1")
    yield from _numbers(TRAIN, "--sequence-length", "0", "-1", "1", HUGE)
    yield from _numbers(TRAIN, "--segment-length", "0", "-1")
    yield from _numbers(TRAIN, "--seed", "-1", str(2**32))
    yield from _numbers(TRAIN, "--held-out", "1", "-1", "2", "1e-300", is_whole=False)
    yield from _numbers(TRAIN, "--learning-rate", "0", "-1", is_whole=False)
    yield from _numbers(TRAIN, "--warmup", "-0.1", "1.1", is_whole=False)
    yield from _numbers(TRAIN, "--weight-decay", "-1", is_whole=False)
    yield from _numbers(GENERATE, "--max-new-tokens", "0", "-1")
    yield from _numbers(GENERATE, "--top-k", "-1")
    yield from _numbers(GENERATE, "--seed")
    yield from _numbers(GENERATE, "--temperature", "-1", is_whole=False)
    yield from _numbers(GENERATE, "--top-p", "-1", "0", "1.1", is_whole=False)
    yield from _numbers(GENERATE, "--repetition-penalty", "-1", "0", is_whole=False)
    yield from _numbers(LINES, "--max-requests", "0", "-1", HUGE)
    yield from _numbers(LINES, "--prefix-slots", "-1", HUGE)


def paths() -> Iterator[list[str]]:
    missing = ["nowhere", "nowhere/a", "", "gone", "loop", "text.txt/a", 300 * "a", "/dev/null", "\udcff", "a\nb"]
    yield from _with(TRAIN, "--data", *missing, "bare", "empty.txt", "short.txt", "latin.txt", "binary.bin", "pipe")
    yield from _with(TRAIN, "--data", *(f"{name}.jsonl" for name in BAD_JSON), "/dev/full", "/proc/self/mem")
    yield from _with(TRAIN, "--config", *missing, "folder", "pipe", "binary.bin", "text.txt")
    yield from _with(TRAIN, "--config", *(f"{name}.json" for name in (*BAD_JSON, *BAD_MODELS)))
    yield from _with(TRAIN, "--tokenizer", *missing, "folder", "pipe", "binary.bin", "text.txt", "model.json")
    yield from _with(TRAIN, "--tokenizer", *(f"{name}.json" for name in BAD_JSON), "tokenizer-cut", "gpt2")
    yield from _with(TRAIN, "--output", "", *UNWRITABLE)
    yield from _with(TRAIN, "--output", *(f"run-{name}" for name in BAD_RUNS), "pipe")
    resumed = ["run-" + name for name in (*BAD_JSON, *BAD_RUNS)]
    yield from _with(["train", "--resume"], "--output", *missing, *UNWRITABLE, *resumed, "folder", "checkpoint", "pipe")
    for command in (GENERATE, LINES):
        yield from _with(command, "--checkpoint", *missing, "folder", "bare", "pipe", "text.txt", "gpt2", "odd-run")
    for file in ("config", "tokenizer", "tokenizer_config", "generation_config", "weights"):
        yield from _with(GENERATE, "--checkpoint", *(f"{file}-{name}" for name in BAD_JSON))
    yield from _with(GENERATE, "--checkpoint", *(f"model-{name}" for name in BAD_MODELS), "weights-huge-header")
    names = ("model.safetensors", "tokenizer.json", "config.json")
    yield from _with(GENERATE, "--checkpoint", *(f"folder-{file}" for file in names))
    yield from _with(LINES, "--prompts", "nowhere", "", "folder", "gone", "loop", "text.txt/a", 300 * "a")
    writable = ("/dev/null",)
    names = (name for name in UNWRITABLE if name not in writable)
    yield from _with(LINES, "--output", "folder", "prompts.jsonl", "checkpoint/config.json", *names)


def words() -> Iterator[list[str]]:
    for command in (["fly"], ["--wings"], [""], ["-"], ["--", "--"], ["bench"], ["bench", "op", "--length", "8"]):
        yield command
    for command in (TRAIN, GENERATE, LINES, ["info"]):
        yield [*command, "--wings"]
        yield [*command, "extra"]
        yield [*command, "-x"]
        yield [*command, "--no-such=3"]
    yield [*TRAIN, *TRAIN[-2:]]
    yield [*GENERATE, "--checkpoint", "checkpoint"]
    yield [*TRAIN, "--steps"]
    yield [*TRAIN, "--bf16=1"]
    yield from _with(_without(TRAIN, "--config"), "--size", "", "huge", "DEMO", "1b")
    yield from _with(TRAIN, "--decay-preset", "", "fast")
    yield from _with(TRAIN, "--sequence-parallel-strategy", "", "train")
    yield from _with(TRAIN, "--sequence-parallel", "2")
    yield from _with(TRAIN, "--text-field", "")
    yield ["train", "--data", "lines.jsonl", "--text-field", "story", "--output", "new"]
    yield [*TRAIN, "--size", "demo"]
    yield [*TRAIN, "--resume"]
    yield [*TRAIN, "--init-from", "missing"]
    yield [*TRAIN, "--lora-rank", "2"]
    yield [*TRAIN, "--validation", "missing"]
    yield [*TRAIN, "--validation", "data.txt", "--held-out", "0.1"]
    yield [*TRAIN, "--keep-best", "--held-out", "0"]
    yield [*TRAIN, "--schedule", "linear"]
    yield from _with(TRAIN, "--report-to", "", "paper", "all", "comet_ml", "Tensorboard")
    yield [*TRAIN, "--report-to", "none", "--report-to", "tensorboard"]
    yield [*TRAIN, "--decay-steps", "2"]
    yield [*TRAIN, "--min-lr", "10"]
    yield from _with(TRAIN, "--chat-template", "", "missing", "folder", "binary.bin", "empty.txt", "bad.jinja", "pipe")
    yield from _with(TRAIN, "--data", *(f"chat-{name}.jsonl" for name in BAD_CHATS))
    yield from _with(TRAIN, "--tokenizer", "someone/nowhere", "a b", "../x", "a/b/c")
    yield ["compare"]
    yield ["compare", "missing"]
    yield ["merge", "--checkpoint", "missing", "--output", "new"]
    yield [*TRAIN, "--push-to-hub", "a/b/c"]
    yield [*TRAIN, "--push-to-hub", "a/b", "--license", "My own"]
    yield [*TRAIN, "--hub-private"]
    yield [*TRAIN, "--hub-base-model", "a/b"]
    yield ["push", "checkpoint"]
    yield ["push", "missing", "a/b"]
    yield ["push", "checkpoint", "a/b/c"]
    yield ["push", "checkpoint", "a/b", "--base-model", "-"]
    yield ["push", "config-cut", "a/b"]
    yield ["push", "weights-cut", "a/b"]
    yield ["tokenizer", "train", "--data", "missing", "--output", "new"]
    yield ["tokenizer", "nothing"]
    yield ["chat", "--checkpoint", "missing"]
    yield ["serve", "--checkpoint", "missing"]
    yield ["train", "--resume", "--output", "new", "--steps", "3"]
    yield ["generate"]
    yield [*GENERATE, "--prompts", "prompts.jsonl"]
    for option, value in (("--output", "new"), ("--max-requests", "64"), ("--prefix-slots", "16")):
        yield [*GENERATE, option, value]


def faults() -> list[tuple[str, ...]]:
    """All faulty invocations, each once."""
    return list(dict.fromkeys(tuple(command) for command in (*numbers(), *paths(), *words())))
