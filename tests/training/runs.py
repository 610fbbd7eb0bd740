"""Training runs of a tiny model, in this process or as commands."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_attention.training import TrainingOptions
from lightning_attention.training.metrics import read_metrics

TEXT = "".join(f"{i} times {j} is {i * j}\n" for i in range(40) for j in range(40))
MODEL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
ON_CPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
COMMAND = [sys.executable, "-c", "from lightning_attention.cli import main; main()"]


def write_inputs(folder: Path) -> None:
    (folder / "data.txt").write_text(TEXT)
    (folder / "model.json").write_text(json.dumps(MODEL))


def options(files: Path, name: str = "run", **changes: Any) -> TrainingOptions:
    defaults: dict[str, Any] = {"steps": 20, "save_every": 10, "eval_every": 10, "log_every": 5, "eval_tokens": 512}
    defaults |= {"sequence_length": 64, "batch_size": 2, "config": files / "model.json"}
    defaults |= {"dtype": "float32", "compile": False}  # not what the machine is fast at
    defaults["data"] = (files / "data.txt",)
    return TrainingOptions(files / name, **defaults | changes)


def arguments(files: Path, name: str = "run", **changes: Any) -> list[str]:
    """Command line of the run with `options`."""
    values = {"output": files / name} | vars(options(files, name, **changes))
    values["data"] = changes.get("data", files / "data.txt")
    flags = {key: value for key, value in values.items() if value not in (None, ()) and not isinstance(value, bool)}
    del flags["size"]
    switches = [f"--{key.replace('_', '-')}" for key, value in values.items() if value is True]
    switches += ["--no-compile"] if values["compile"] is False else []
    return ["train", *(f"--{key.replace('_', '-')}={value}" for key, value in flags.items()), *switches]


def quiet() -> Console:
    return Console(quiet=True)


def losses(output: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(output / "metrics.jsonl") if "loss" in record}


def command(*arguments: object, env: Mapping[str, str] = ON_CPU, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `lightning-attention` and wait for its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=300, **options
    )


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start `lightning-attention` without waiting."""
    pipe = subprocess.PIPE
    return subprocess.Popen([*COMMAND, *map(str, arguments)], env=ON_CPU, stdout=pipe, stderr=pipe, text=True)


def torchrun(processes: int, *command: str, restarts: int = 0, where: Mapping[str, str] = ON_CPU) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*launch, f"--max-restarts={restarts}", "-m", "lightning_attention.cli", *command],
        env={**where, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Wait until a running command has written a file."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def workers_after(checkpoint: Path, launcher: subprocess.Popen) -> list[int]:
    """Process ids of the workers of torchrun, once they have written a checkpoint."""
    wait_for(checkpoint, launcher)
    return [int(child) for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def wait_for_end(process: int, seconds: float) -> None:
    """Wait for the end of a process that is not a child of this one."""
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def error_lines(stderr: str) -> list[str]:
    """Lines that the command itself has written."""
    assert "Traceback" not in stderr, stderr
    return [line for line in stderr.splitlines() if line.startswith("lightning-attention:")]
