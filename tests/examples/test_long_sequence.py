"""The example of long sequences, small."""

import re
import subprocess
import sys
from pathlib import Path

from training.runs import ON_CPU

from lightning_attention.training.metrics import read_metrics

EXAMPLE = Path(__file__).parents[2] / "examples" / "long_sequence.py"


def test_the_example_trains_by_segments_and_shows_losses_by_position(tmp_path: Path) -> None:
    words = ["--sequence-length", "512", "--segment-length", "64", "--size", "demo", "--steps", "3"]
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), *words], cwd=tmp_path, env=ON_CPU, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    records = read_metrics(tmp_path / "long" / "metrics.jsonl")
    assert [record["tokens"] for record in records if "loss" in record] == [512, 1024, 1536]
    found = re.findall(r"from ([\d,]+) +(\d\.\d{4})", result.stdout)
    assert [position for position, _ in found] == ["0", "64", "128", "256"]
    held_out = next(record["eval_loss"] for record in records if "eval_loss" in record)
    weights = (1, 1, 2, 4)
    mean = sum(weight * float(loss) for weight, (_, loss) in zip(weights, found, strict=True)) / 8
    assert abs(mean - held_out) < 0.1  # the first token of a segment is not predicted
