"""What bounds the kernels for Hopper: what Nsight Compute counts in each, which then runs alone.

python benchmarks/counters.py results.json
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.machine import machine
from lightning_attention import decay
from lightning_attention.ops import hopper

SHAPES = [(4, 32768, 32, 128), (4, 32768, 32, 64), (1, 8192, 64, 128), (1, 8192, 8, 128)]
KERNELS = "scan_kernel|gradient_kernel|interval_state_kernel|accumulate_kernel"
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "LaunchStats")
# Throughputs in percent of what the GPU can do; of compute, that of the busiest of its parts, tensor cores among them.
COUNTERS = {
    "Grid Size": "programs",
    "DRAM Throughput": "memory_percent",
    "L2 Cache Throughput": "l2_percent",
    "L2 Hit Rate": "l2_hit_percent",
    "Compute (SM) Throughput": "compute_percent",
    "Issue Slots Busy": "issue_percent",
}


def run(B: int, T: int, H: int, D: int) -> None:
    """Forward and backward, twice: the second time nothing is compiled, and it is profiled."""
    q, k, v, do = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    log_decay = decay.log_decay(H, preset="alibi").cuda()
    for is_profiled in (False, True):
        torch.cuda.synchronize()
        if is_profiled:
            torch.cuda.profiler.start()
        hopper.forward(q, k, v, log_decay, None, None, 1.0, False)
        hopper.backward(q, k, v, do, log_decay, None, None, None, 1.0)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def profile(shape: tuple[int, ...]) -> list[dict[str, str | float]]:
    """The launches, in order."""
    sections = [option for section in SECTIONS for option in ("--section", section)]
    options = ["--profile-from-start", "off", "--clock-control", "none", "-k", f"regex:{KERNELS}", *sections]
    command = ["ncu", "--csv", "--page", "details", *options, sys.executable, __file__, *map(str, shape)]
    found = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in found.stdout.splitlines() if line.startswith('"')]
    assert len(lines) > 1, found.stdout[-2000:] + found.stderr[-2000:]
    launches: dict[str, dict[str, str | float]] = {}
    for line in csv.DictReader(lines):
        launch = launches.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
        if name := COUNTERS.get(line["Metric Name"]):
            launch[name] = float(line["Metric Value"].replace(",", ""))
        elif line["Metric Name"] == "Duration":
            nanoseconds = {"ns": 1, "us": 1e3, "ms": 1e6}[line["Metric Unit"]]
            launch["milliseconds"] = float(line["Metric Value"].replace(",", "")) * nanoseconds / 1e6
    return list(launches.values())


def main(output: Path) -> None:
    results = []
    for shape in SHAPES:
        sizes = dict(zip(("batch_size", "length", "num_heads", "head_dim"), shape, strict=True))
        results.append(sizes | {"launches": profile(shape)})
        print(json.dumps(results[-1], indent=1), flush=True)
    command = "python benchmarks/counters.py results.json"
    document = {"machine": machine(torch.device("cuda")), "command": command, "results": results}
    output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    run(*map(int, arguments)) if len(arguments) == 4 else main(Path(arguments[0]))
