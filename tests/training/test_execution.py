"""A run computes in the precision that suits its device, and compiles layers where that pays."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import HAS_GPU
from training.runs import ON_CPU, arguments, command, error_lines, losses, options, quiet

from lightning_attention.training import TrainingOptions, train
from lightning_attention.training.execution import choose_execution
from lightning_attention.training.folder import CHECKSUMS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
without_gpu = pytest.mark.skipif(HAS_GPU, reason="the GPU can compile")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def choose(device: torch.device, **given: Any):
    return choose_execution(TrainingOptions(Path("run"), **given), device)


def test_layers_are_eager_on_a_cpu_by_default():
    execution = choose(CPU, dtype="float32")
    assert not execution.compiled
    assert execution.description == (
        "float32, eager layers: by default layers are compiled on a GPU alone (--compile to change)"
    )


def test_the_description_says_why_a_cpu_takes_float32():
    execution = choose(CPU, compile=False)
    assert execution.bf16 == ("AMX" not in execution.description)
    assert execution.bf16 == execution.description.startswith("bfloat16 autocast")


@pytest.mark.parametrize("is_native", [True, False])
def test_a_gpu_takes_bfloat16_if_that_is_native(monkeypatch, is_native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: is_native)
    execution = choose(CUDA, compile=False)
    assert execution.description == (
        "bfloat16 autocast, eager layers (--dtype float32 to change)"
        if is_native
        else "float32, eager layers: this GPU emulates bfloat16 (--dtype bfloat16 to change)"
    )
    assert execution.bf16 == is_native


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_options_given_are_kept(device, dtype):
    execution = choose(device, dtype=dtype, compile=False)
    assert (execution.bf16, execution.compiled) == (dtype == "bfloat16", False)
    assert "to change" not in execution.description


def test_float8_is_refused_where_it_does_not_pay():
    with pytest.raises(ValueError, match=r"fp8 must be off on this machine: .* pay on GPUs alone, not on cpu"):
        choose(CPU, fp8=True)
    with pytest.raises(ValueError, match="fp8 goes with dtype 'bfloat16' or 'auto', got 'float32'"):
        choose(CPU, fp8=True, dtype="float32")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_float8_is_of_products_and_all_else_bfloat16(monkeypatch, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr("lightning_attention.training.execution.float8_error", lambda device: None)
    execution = choose(CUDA, fp8=True, dtype=dtype, compile=False)
    assert execution.bf16
    assert execution.description == "float8 products, bfloat16 autocast, eager layers"


def test_float8_says_what_a_gpu_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr("lightning_attention.training.execution.float8_error", lambda device: "no such product")
    with pytest.raises(ValueError, match="fp8 must be off on this machine: no such product"):
        choose(CUDA, fp8=True, compile=False)


@without_gpu
def test_a_gpu_that_cannot_compile_falls_back_and_says_why():
    execution = choose(CUDA, dtype="float32")
    assert not execution.compiled
    assert execution.description.startswith("float32, eager layers: torch.compile")
    with pytest.raises(ValueError, match=r"compile must be off on this machine: torch\.compile"):
        choose(CUDA, dtype="float32", compile=True)


@pytest.mark.slow
def test_a_missing_compiler_is_one_error_before_the_run_starts(files):
    broken = ON_CPU | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(files / "cache")}
    process = command(*arguments(files, compile=True), env=broken)
    assert process.returncode == 2
    (line,) = error_lines(process.stderr)
    assert "compile must be off on this machine: torch.compile fails" in line
    assert not (files / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"segment_length": 17}, {"gradient_checkpointing": True}], ids=str)
def test_a_compiled_run_makes_the_steps_of_an_eager_one_and_resumes_eager(files, changes):
    """The backend is the compiler's own."""
    train(options(files, "eager"), console=quiet())
    process = command(*arguments(files, "compiled", compile=True, **changes))
    assert process.returncode == 0, process.stderr
    assert "float32, compiled layers\n" in process.stdout
    assert losses(files / "compiled") == pytest.approx(losses(files / "eager"), rel=1e-4)
    shutil.rmtree(files / "compiled" / "checkpoint-20")
    process = command("train", "--resume", f"--output={files / 'compiled'}", "--no-compile")
    assert process.returncode == 0, process.stderr
    assert "compile True is now False" in process.stdout
    assert losses(files / "compiled") == pytest.approx(losses(files / "eager"), rel=1e-4)


def edit(run: Path, without: tuple[str, ...] = (), **changes: Any) -> None:
    saved = json.loads(run.read_text())
    run.write_text(json.dumps({name: value for name, value in (saved | changes).items() if name not in without}))


@pytest.mark.parametrize(("bf16", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_runs_of_earlier_versions_keep_their_dtype(files, bf16, dtype):
    train(options(files, steps=10, dtype=dtype), console=quiet())
    for folder in (files / "run", files / "run" / "checkpoint-10"):
        edit(folder / "run.json", without=("dtype",), bf16=bf16, steps=20)
    (files / "run" / "checkpoint-10" / CHECKSUMS).unlink()
    saved = TrainingOptions.load(files / "run")
    assert saved.dtype == dtype
    train(saved, resume=True, console=quiet())
    assert max(losses(files / "run")) == 20


def test_dtype_may_change_when_a_run_resumes(files):
    train(options(files, steps=10), console=quiet())
    edit(files / "run" / "run.json", steps=20)
    process = command("train", "--resume", f"--output={files / 'run'}", "--dtype=bfloat16")
    assert process.returncode == 0, process.stderr
    assert "dtype float32 is now bfloat16" in process.stdout
    assert "bfloat16 autocast, eager layers\n" in process.stdout


@pytest.mark.slow
def test_bf16_is_short_for_a_dtype(files):
    given = [argument for argument in arguments(files, steps=5) if not argument.startswith("--dtype")]
    assert command(*given, "--bf16").returncode == 0
    assert TrainingOptions.load(files / "run").dtype == "bfloat16"
    (line,) = error_lines(command(*given, "--bf16", "--dtype=float32").stderr)
    assert "give --dtype or --bf16, not both" in line
