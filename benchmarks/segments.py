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

from lightning_attention.bench.cases import BACKWARD, FORWARD, OpCase, Pass
from lightning_attention.bench.harness import Call, interleaved_times, release
from lightning_attention.bench.machine import machine
from lightning_attention.ops import decay, hopper
from lightning_attention.ops import triton as portable
from lightning_attention.ops.hopper import launch
from lightning_attention.ops.hopper.config import C
from lightning_attention.ops.triton.config import Segments, ceil_div

DEVICE = torch.device("cuda")
# Numbers of segments of heads of 128; of heads of 64, of which a multiprocessor runs two, twice as many.
COUNTS = {1: (1, 8, 16, 32, 48, 64, 100, 132), 8: (1, 4, 6, 8, 12, 16), 16: (1, 3, 4, 6, 8), 32: (1, 2, 3, 4)}
LENGTHS = (2048, 8192, 32_768)
LONG = {(1, 131_072, 16): [2, 4, 8], (1, 1 << 20, 1): [32, 66, 132], (2, 1 << 20, 8): [2, 4, 8]}


@contextmanager
def cut(count: int) -> Iterator[None]:
    """Rows into so many segments of one interval."""

    def segments(scans: launch._Scans) -> Segments:
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
    q, k, v, do = (torch.randn(case.shape, device=DEVICE, dtype=case.dtype) for _ in range(4))
    log_decay = decay.log_decay(case.num_heads, preset="alibi").to(DEVICE)
    kernels: dict[Pass, Callable[..., object]] = {
        FORWARD: lambda backend: backend.forward(q, k, v, log_decay, None, None, 1.0, False),
        BACKWARD: lambda backend: backend.backward(q, k, v, do, log_decay, None, None, None, 1.0),
    }
    scans = (kind(q, v, log_decay, None, 1.0) for kind in (launch._Scans, launch._Gradients))
    found: dict[str, object] = {
        "batch_size": case.batch_size,
        "length": case.length,
        "num_heads": case.num_heads,
        "head_dim": case.head_dim,
        "chosen": [scan.segments.count for scan in scans],
    }
    for direction, call in kernels.items():
        times, failures = interleaved_times(calls(call, counts), 0.012, DEVICE)
        assert not failures, failures
        found[f"{direction.name}_milliseconds"] = {name: round(1e3 * time, 4) for name, time in times.items()}
    return found


def main(output: Path) -> None:
    results = []
    for head_dim in (128, 64):
        for num_heads, counts in COUNTS.items():
            for length in LENGTHS:
                case = OpCase(1, length, num_heads, head_dim, torch.bfloat16)
                scaled = {count * (128 // head_dim) if count > 1 else 1 for count in counts}
                results.append(measure(case, sorted(count for count in scaled if count * C <= length)))
                print(results[-1], flush=True)
                release(DEVICE)
    for (batch_size, length, num_heads), counts in LONG.items():
        results.append(measure(OpCase(batch_size, length, num_heads, 128, torch.bfloat16), counts))
        print(results[-1], flush=True)
        release(DEVICE)
    document = {"machine": machine(DEVICE), "command": "python benchmarks/segments.py results.json", "results": results}
    output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
