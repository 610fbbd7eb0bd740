"""Documentation runs as printed: code blocks, commands, links, numbers and docstring examples.

The commands `generate` and `info` run; names and options of others are checked, since they take minutes.
A block that cannot run on a CPU has a comment with the reason before it: `<!-- not run: needs a GPU -->`.
"""

import doctest
import gzip
import importlib
import inspect
import json
import math
import re
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import typer
from tiny_model import save_checkpoint

from benchmarks import pages
from lightning_attention.cli import main
from lightning_attention.models import SIZES, LightningConfig, LightningForCausalLM

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
SHELL, PLAIN = ("console", "bash"), ("text",)
FENCE = re.compile(r"(?:<!-- not run(?P<reason>.*?)-->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
MODULES = ("", ".ops.decay", ".distributed", ".inference", ".models", ".nn", ".serving", ".training")
# Command lines by what starts them, and where their options are defined.
COMMANDS = {
    "lightning-attention": "lightning_attention.cli.app",
    "lightning_attention": "lightning_attention.cli.app",
    "lightning_attention.cli": "lightning_attention.cli.app",
    "benchmarks": "benchmarks.commands",
}
# Subcommands that a test can run: they end soon.
QUICK = ("generate", "info")


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str
    reason: str | None  # why it is not run; None if it is

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found["language"], found["code"], found["reason"])
        for found in FENCE.finditer(text)
    ]


def commands_of(block: Block) -> list[tuple[list[str], str]]:
    """Commands of a block, and what they print; a `console` block has both, `bash` only commands."""
    found: list[tuple[list[str], list[str]]] = []
    for line in block.code.replace("\\\n", " ").splitlines():
        if block.language == "bash" or line.startswith("$ "):
            words = shlex.split(line.removeprefix("$ "), comments=True)
            found += [(words, [])] if words else []
        else:
            found[-1][1].append(line)
    return [(command, "\n".join(output).strip()) for command, output in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page) if block.language not in PLAIN]
RUN = [block for block in BLOCKS if block.reason is None]
PYTHON_PAGES = sorted({block.page for block in RUN if block.language == "python"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Current folder with the files that the pages name, and the variables of torchrun for one process."""
    save_checkpoint(tmp_path / "run" / "checkpoint-20000")
    (tmp_path / "run" / "best").symlink_to("checkpoint-20000")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "book.txt").write_text("Once upon a time there was a fox. " * 200)
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(b'{"text": "There was a dog."}\n' * 100))
    (tmp_path / "questions.jsonl").write_text('{"prompt": "Why?", "max_new_tokens": 3}\n')
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, folder: Path) -> None:
    """Blocks of a page run in order and share their names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in RUN:
        if block.page == page and block.language == "python":
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)


@pytest.mark.parametrize("block", [block for block in RUN if block.language in SHELL], ids=str)
def test_commands_exist(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)  # the package `benchmarks`
    for command, _ in commands_of(block):
        check_command(command)


@pytest.mark.parametrize(
    ("block", "command", "output"),
    [
        pytest.param(block, command, output, id=f"{block}-{' '.join(command[:2])}")
        for block in RUN
        if block.language in SHELL
        for command, output in commands_of(block)
        if command[0] == "lightning-attention" and (output or command[1] in QUICK)
    ],
)
def test_commands_run(block, command, output, folder, monkeypatch, capfd) -> None:
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capfd.readouterr()
    if output:
        assert (printed.out + printed.err).strip() == output
    else:
        assert (stopped.value.code or 0, printed.err) == (0, "")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_run_or_says_why_not(block: Block) -> None:
    assert block.language in ("python", *SHELL), "plain text has the language `text`"
    if block.reason is not None:
        assert re.match(r": *\w.{9,}", block.reason), "a reason follows `not run:`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors_of(linked), target


@pytest.mark.parametrize("page", pages.PAGES)
def test_pages_of_results_are_what_the_command_writes(page: str) -> None:
    assert (ROOT / page).read_text(encoding="utf-8") == pages.text_of(page), "run python -m benchmarks tables"


def test_readme_numbers_are_in_the_results() -> None:
    """The runs are no older than the code that they measure: docs/benchmarks.md has the same runs."""
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    shown, _, left_out = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8").partition("## Left out")
    heads = json.loads((ROOT / "benchmarks/results/h200/heads.json").read_text())["results"]
    sizes = {"batch_size": 1, "length": 32768, "num_heads": 128, "head_dim": 128}
    long = next(x for x in heads if x | sizes == x)["forward_milliseconds"]["chosen"]
    bytes_moved = 4 * 2 * math.prod(sizes.values())  # q, k, v and o
    softmax, ours = (
        result("h200/decode.json", "model", name, length=1 << 20) for name in ("SDPA cuDNN", "lightning_attention")
    )
    short, medium = (result("h200/speed.json", "speed", "lightning_attention", length=n) for n in (1024, 16384))
    llamas = [result("h200/speed.json", "speed", "LLaMA (transformers)", length=n) for n in (1024, 16384)]
    fla = result("h200/peers.json", "table", "fla chunk_simple_gla", batch_size=4, length=32768)
    segments = result("h200/train.json", "train", "lightning_attention", length=1 << 21)
    runs = {"heads": "heads", "decode": "model", "speed": "speed", "peers": "table", "train": "train"}
    for file, run in ((f"h200/{name}.json", run) for name, run in runs.items()):
        assert file in shown
        assert not re.search(rf"{file}\S* \| {run} \|", left_out)
    assert f"writes its output at {bytes_moved / long / 1e9:.1f} TB/s" in readme
    times = [fla[direction]["times_ours"] for direction in ("forward", "backward")]
    assert (
        "flash-linear-attention 0.6 takes {:.2f} times as long forward and {:.2f} times backward".format(*times)
        in readme
    )
    assert f"a step of 2M tokens takes {segments['peak_bytes'] / 2**30:.1f} GiB beside" in readme
    assert f"at {segments['tokens_per_second']:,.0f} tokens/s on one H200" in readme
    assert f"it takes {softmax['milliseconds'] / ours['milliseconds']:.0f} times as long" in readme
    speeds = [f"{x['tokens_per_second'] / 1000:.0f},000" for x in (medium, short)]
    assert f"{' to '.join(speeds)} tokens/s" in readme
    assert f"takes {llamas[0]['times_ours']:.2f} to {llamas[1]['times_ours']:.2f} times as long" in readme
    assert f"{short['parameters'] / 1e6:.0f}M and {llamas[0]['parameters'] / 1e6:.0f}M parameters" in readme


def test_readme_fits_a_hundred_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_true(size: str) -> None:
    cells = re.search(rf"^\| {size} \|.*\| (\S+) \| (\S+) \|$", (ROOT / "docs/training.md").read_text(), re.M)
    assert cells is not None
    for stated, vocab_size in zip(cells.groups(), (259, 64_000), strict=True):
        with torch.device("meta"):
            model = LightningForCausalLM(LightningConfig.from_size(size, vocab_size=vocab_size))
        count = sum(parameter.numel() for parameter in model.parameters())
        unit = {"M": 1e6, "B": 1e9}[stated[-1]]
        assert count / unit == pytest.approx(float(stated[:-1]), rel=4e-3)


def docstring_examples() -> Iterator[tuple[str, str]]:
    """Docstrings with an example, by name: `>>>` lines, or a block after `Example::`."""
    for name in MODULES:
        module = importlib.import_module(f"lightning_attention{name}")
        for key in getattr(module, "__all__", vars(module)):
            value = getattr(module, key)
            if key.startswith("_") or not getattr(value, "__module__", "").startswith("lightning_attention"):
                continue
            members = vars(value).items() if isinstance(value, type) else ()
            for member, documented in [("", value), *members]:
                text = inspect.getdoc(documented) if member == "" or inspect.isfunction(documented) else None
                if text and (">>>" in text or "Example::" in text):
                    yield f"lightning_attention{name}.{key}.{member}".strip("."), text


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in docstring_examples()])
def test_docstring_examples_run(text: str, folder: Path) -> None:
    if ">>>" not in text:
        found = re.search(r"^Example::\n((?:\n| +.*\n?)+)", text, re.M)
        assert found is not None
        exec(compile(textwrap.dedent(found[1]), "example", "exec"), {})
        return
    report: list[str] = []
    example = doctest.DocTestParser().get_doctest(text, {}, "example", None, None)
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=report.append)
    assert not failed, "".join(report)


def check_command(words: Sequence[str]) -> None:
    """Fail unless what the command names exists: program, subcommand, options, files, targets of make, extras."""
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        words = words[1:]
    program, arguments = words[0], list(words[1:])
    if program == "torchrun" or arguments[:1] == ["-m"]:
        program, *arguments = arguments[arguments.index("-m") + 1 :]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in (word for word in arguments if "=" not in word):
            assert re.search(rf"^{re.escape(target)}:", makefile, re.M), target
    elif program == "pip":
        check_pip(arguments)
    elif program in COMMANDS:
        check_options(COMMANDS[program], arguments)
    elif program in ("python", "pytest"):
        for path in (word for word in arguments if "/" in word):
            assert (ROOT / path.partition("::")[0]).exists(), path
    else:
        assert program in ("export", "hf", "pre-commit"), f"{program} is not known here"


def check_pip(arguments: list[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[0] == "install"
    for word in arguments[1:]:
        if found := re.search(r"\[(.*)\]", word):
            assert set(found[1].split(",")) <= set(known), word
        elif word.endswith(".txt"):
            assert (ROOT / word).exists(), word


def check_options(module: str, arguments: list[str]) -> None:
    app = importlib.import_module(module).app
    commands = getattr(typer.main.get_command(app), "commands")  # noqa: B009
    if arguments and arguments[0] != "--version":
        command, *arguments = commands[arguments[0]], *arguments[1:]
        if arguments and (subcommands := getattr(command, "commands", None)):
            command, *arguments = subcommands[arguments[0]], *arguments[1:]
        _, rest, _ = command.make_parser(typer.Context(command)).parse_args(arguments)
        assert rest == []


def anchors_of(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def result(file: str, run: str, implementation: str, **sizes: int) -> dict[str, Any]:
    """The first result of a run with these sizes."""
    results = json.loads((ROOT / "benchmarks/results" / file).read_text())["runs"][run]["results"]
    wanted = {"implementation": implementation} | sizes
    return next(x for x in results if all(x.get(name) == value for name, value in wanted.items()))


def named_tests(page: Path) -> set[tuple[str, str]]:
    """Files and functions; `::name` is in the file that was named last."""
    found, file = set(), ""
    for path, function in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", page.read_text(encoding="utf-8")):
        file = path or file
        if function:
            found.add((file, function))
    return found


def functions_of(file: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)\(", (ROOT / file).read_text(encoding="utf-8"), re.M))


def test_every_promise_of_equal_bits_names_a_test() -> None:
    page = ROOT / "docs/determinism.md"
    named = named_tests(page)
    assert {(file, function) for file, function in named if function not in functions_of(file)} == set()
    for table in re.findall(r"^\| result \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"), re.M):
        for line in table.splitlines():
            assert re.search(r"\| `::test_\w+` \|$", line), line
    file = "tests/ops/test_determinism.py"
    assert {function for function in functions_of(file) if (file, function) not in named} == set()


def test_memory_of_decoding_states_is_true() -> None:
    text = (ROOT / "docs/determinism.md").read_text(encoding="utf-8")
    sizes, checked = ("", ""), 0
    for head, state, *rest in re.findall(r"^\| (\d+ x \d+)? ?\| (\d+)? ?\| (\d+) \| (\d+) \| (\d+) \|$", text, re.M):
        sizes = (head, state) if head else sizes
        K, V = map(int, sizes[0].split(" x "))
        C, *rings = map(int, rest)
        assert int(sizes[1]) == 4 * K * V / 1024
        assert rings == [C * (K + V) * bytes_of / 1024 for bytes_of in (4, 2)]
        checked += 1
    assert checked == 6
