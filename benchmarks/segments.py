"""Few heads: the time of every number of segments, to which the model in `ops/hopper/config.py` is fitted.

python benchmarks/segments.py results.json
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.cases import BACKWARD, FORWARD, OpCase, Pass
from benchmarks.harness import Call, interleaved_times, release
from benchmarks.machine import machine
from benchmarks.peers import Inputs
from lightning_attention.ops import hopper
from lightning_attention.ops import triton as portable
from lightning_attention.ops.hopper import launch
from lightning_attention.ops.hopper.config import C, two_segments
from lightning_attention.ops.triton.config import Segments, ceil_div

DEVICE = torch.device("cuda")
# Numbers of segments of heads of 128; of heads of 64, of which a multiprocessor runs two, twice as many.
COUNTS = {1: (1, 8, 16, 32, 48, 64, 100, 132), 8: (1, 4, 6, 8, 12, 16), 16: (1, 3, 4, 6, 8), 32: (1, 2, 3, 4)}
LENGTHS = (2048, 8192, 32_768)
LONG = {(1, 131_072, 16): [2, 4, 8], (1, 1 << 20, 1): [32, 66, 132], (2, 1 << 20, 8): [2, 4, 8]}
# Packed rows of 32,768 tokens: documents and heads of 128.
PACKED = {(20, 16): [2, 4, 8], (20, 32): [1, 2, 3, 4], (20, 64): [1, 2], (4, 32): [1, 2, 3, 4], (4, 64): [1, 2]}


@contextmanager
def cut(count: int) -> Iterator[None]:
    """Rows into so many segments."""

    def segments(scans: launch._Scans) -> Segments:
        if count == 2:
            return two_segments(scans.T, scans.sequence_length)
        length = ceil_div(scans.T, count * C) * C
        return Segments(length, length, ceil_div(scans.T, length))

    with patch.object(launch._Scans, "cut", segments):
        yield


def calls(call: Callable[..., object], counts: list[int]) -> dict[str, Call]:
    """As chosen, by the portable kernels, and in every number of segments."""

    def of(count: int) -> Call:
        def run() -> object:
            with cut(count):
                return call(hopper)

        return run

    found: dict[str, Call] = {"chosen": lambda: call(hopper), "portable": lambda: call(portable)}
    return found | {str(count): of(count) for count in counts}


def measure(case: OpCase, counts: list[int]) -> dict[str, object]:
    inputs = Inputs(case, DEVICE)
    (q, k, v), do, log_decay, bounds = inputs.qkv, inputs.do, inputs.log_decay, inputs.cu_seqlens
    kernels: dict[Pass, Callable[..., object]] = {
        FORWARD: lambda backend: backend.forward(q, k, v, log_decay, None, bounds, 1.0, False),
        BACKWARD: lambda backend: backend.backward(q, k, v, do, log_decay, None, None, bounds, 1.0),
    }
    scans = (kind(q, v, log_decay, bounds, 1.0) for kind in (launch._Scans, launch._Gradients))
    found: dict[str, object] = {
        "batch_size": case.batch_size,
        "length": case.length,
        "num_heads": case.num_heads,
        "head_dim": case.head_dim,
        "documents": case.documents,
        "chosen": [scan.segments.count for scan in scans],
    }
    for direction, call in kernels.items():
        times, failures = interleaved_times(calls(call, counts), 0.012, DEVICE)
        assert not failures, failures
        found[f"{direction.name}_milliseconds"] = {name: round(1e3 * time, 4) for name, time in times.items()}
    return found


def cases() -> Iterator[tuple[OpCase, list[int]]]:
    """Rows, and in how many segments."""
    for head_dim in (128, 64):
        for num_heads, counts in COUNTS.items():
            for length in LENGTHS:
                scaled = {count * (128 // head_dim) if count > 1 else 1 for count in counts}
                fitting = sorted(count for count in scaled if count * C <= length)
                yield OpCase(1, length, num_heads, head_dim, torch.bfloat16), fitting
    for (batch_size, length, num_heads), counts in LONG.items():
        yield OpCase(batch_size, length, num_heads, 128, torch.bfloat16), counts
    for (documents, num_heads), counts in PACKED.items():
        yield OpCase(1, max(LENGTHS), num_heads, 128, torch.bfloat16, documents), counts


@torch.no_grad()
def main(output: Path) -> None:
    results = []
    for case, counts in cases():
        results.append(measure(case, counts))
        print(results[-1], flush=True)
        release(DEVICE)
    document = {"machine": machine(DEVICE), "command": "python benchmarks/segments.py results.json", "results": results}
    output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
