"""The operator beside softmax attention: time per token and memory against length."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import decay
from ..ops.api import lightning_attention
from .cases import OpCase
from .harness import interleaved_times, machine, peak_bytes

LIGHTNING, SOFTMAX = "lightning_attention", "scaled_dot_product_attention"


def measure(
    cases: Iterable[OpCase], device: torch.device, *, softmax_up_to: int, seconds: float = 2.0
) -> Iterator[dict[str, Any]]:
    """One record for every case and implementation, as they are measured: forward and backward together.

    Args:
        cases: shapes.
        device: where to run.
        softmax_up_to: longest sequence to run quadratic attention on.
        seconds: to spend on timing each call, about.
    """
    for case in cases:
        calls = _calls(case, device)
        if case.length > softmax_up_to:
            del calls[SOFTMAX]
        times = interleaved_times(calls, seconds, device)
        memory = {name: peak_bytes(call, device) for name, call in calls.items()}
        for name, time in times.items():
            flops = case.linear_flops() if name == LIGHTNING else case.softmax_flops()
            yield {
                "implementation": name,
                "batch_size": case.batch_size,
                "length": case.length,
                "num_heads": case.num_heads,
                "head_dim": case.head_dim,
                "dtype": str(case.dtype).removeprefix("torch."),
                "milliseconds": round(time * 1e3, 4),
                "microseconds_per_token": round(time * 1e6 / case.num_tokens, 4),
                "gflops": round(flops / time / 1e9, 1),
                "peak_bytes": memory[name],
                "peak_over_q": None if memory[name] is None else round((memory[name] or 0) / case.tensor_bytes, 2),
                "speedup": round(times[SOFTMAX] / time, 2) if SOFTMAX in times else None,
            }


def write(records: list[dict[str, Any]], device: torch.device, command: str, folder: Path) -> tuple[Path, Path]:
    """`op.json` with the machine and the command that made it, and `op.png` drawn from it."""
    folder.mkdir(parents=True, exist_ok=True)
    results, picture = folder / "op.json", folder / "op.png"
    document = {"machine": machine(device), "command": command, "what": "forward and backward", "results": records}
    results.write_text(json.dumps(document, indent=1) + "\n")
    plot(document, picture)
    return results, picture


def plot(document: dict[str, Any], picture: Path) -> None:
    """Two panels against length: time per token, and peak memory over the size of q."""
    from matplotlib.figure import Figure

    panels = (
        ("microseconds_per_token", "time per token (µs)"),
        ("peak_over_q", "peak memory (times the size of q)"),
    )
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (field, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for name in (LIGHTNING, SOFTMAX):
            points = [(r["length"], r[field]) for r in document["results"] if r["implementation"] == name and r[field]]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        lengths = sorted({r["length"] for r in document["results"]})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
        axes.set(xlabel="sequence length (tokens)", ylabel=label)
        axes.grid(alpha=0.3)
    time, memory = figure.axes
    memory.set_ylim(bottom=0)
    time.set_yscale("log")
    time.yaxis.set_major_formatter("{x:g}")
    time.yaxis.set_minor_formatter("{x:g}")
    time.legend()
    first = document["results"][0]
    shape = f"B {first['batch_size']}, H {first['num_heads']}, D {first['head_dim']}, {first['dtype']}"
    figure.suptitle(f"forward and backward, {shape}, {document['machine']['device']}", fontsize=10)
    figure.savefig(picture, dpi=150)


def _calls(case: OpCase, device: torch.device) -> dict[str, Callable[[], object]]:
    generator = torch.Generator(device).manual_seed(0)
    shape = case.batch_size, case.length, case.num_heads, case.head_dim
    q, k, v, do = (torch.randn(shape, generator=generator, device=device, dtype=case.dtype) for _ in range(4))
    log_decay = decay.log_decay(case.num_heads, preset="alibi").to(device)

    def differentiated(attention: Callable[..., Tensor], inputs: tuple[Tensor, ...], do: Tensor):
        leaves = [x.detach().requires_grad_() for x in inputs]
        return lambda: torch.autograd.grad(attention(*leaves), leaves, do)

    head_first = tuple(x.transpose(1, 2).contiguous() for x in (q, k, v, do))
    return {
        LIGHTNING: differentiated(lambda q, k, v: lightning_attention(q, k, v, log_decay).output, (q, k, v), do),
        SOFTMAX: differentiated(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), head_first[:3], head_first[3]
        ),
    }
