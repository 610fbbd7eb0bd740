"""Hardware counters of the kernels for Hopper, by Nsight Compute, which runs every kernel alone."""

import csv
import subprocess
import sys
from pathlib import Path

import torch

from lightning_attention import decay, lightning_attention

from .report import Record

# (B, T, H, D)
SHAPES = [(4, 32768, 32, 128), (4, 32768, 32, 64), (1, 8192, 64, 128), (1, 8192, 8, 128)]
KERNELS = "scan_kernel|gradient_kernel|interval_state_kernel|accumulate_kernel"
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "LaunchStats")
# Throughputs in percent of the GPU's peak; of compute, of the busiest unit, tensor cores included.
COUNTERS = {
    "Grid Size": "programs",
    "DRAM Throughput": "memory_percent",
    "L2 Cache Throughput": "l2_percent",
    "L2 Hit Rate": "l2_hit_percent",
    "Compute (SM) Throughput": "compute_percent",
    "Issue Slots Busy": "issue_percent",
}


def measure(B: int, T: int, H: int, D: int) -> Record:
    """Profile forward and backward: sizes, and the counters of every launch in order."""
    sections = [option for section in SECTIONS for option in ("--section", section)]
    options = ["--profile-from-start", "off", "--clock-control", "none", "-k", f"regex:{KERNELS}", *sections]
    program = [sys.executable, "-m", "benchmarks.counters", *map(str, (B, T, H, D))]
    command = ["ncu", "--csv", "--page", "details", *options, *program]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    lines = [line for line in found.stdout.splitlines() if line.startswith('"')]
    if len(lines) < 2:
        raise OSError(f"ncu reports no kernel: {found.stdout[-2000:]}{found.stderr[-2000:]}")
    launches: dict[str, Record] = {}
    for line in csv.DictReader(lines):
        launch = launches.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
        if name := COUNTERS.get(line["Metric Name"]):
            launch[name] = float(line["Metric Value"].replace(",", ""))
        elif line["Metric Name"] == "Duration":
            nanoseconds = {"ns": 1, "us": 1e3, "ms": 1e6}[line["Metric Unit"]]
            launch["milliseconds"] = float(line["Metric Value"].replace(",", "")) * nanoseconds / 1e6
    return {"batch_size": B, "length": T, "num_heads": H, "head_dim": D, "launches": list(launches.values())}


def run(B: int, T: int, H: int, D: int) -> None:
    """Run forward and backward twice; profile the second time, when all kernels are compiled."""
    q, k, v, do = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    log_decay = decay.log_decay(H, preset="alibi").cuda()
    for x in (q, k, v):
        x.requires_grad_()
    for is_profiled in (False, True):
        torch.cuda.synchronize()
        if is_profiled:
            torch.cuda.profiler.start()
        o = lightning_attention(q, k, v, log_decay, backend="hopper").output
        torch.autograd.grad(o, (q, k, v), do)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    B, T, H, D = map(int, sys.argv[1:])
    run(B, T, H, D)
