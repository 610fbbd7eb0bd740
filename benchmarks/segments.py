"""Time against the number of segments, to which the cost model in `ops/hopper/config.py` is fitted."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from lightning_attention.ops.calls import call
from lightning_attention.ops.gpu import scans
from lightning_attention.ops.gpu.segments import Segments, ceil_div
from lightning_attention.ops.hopper import config
from lightning_attention.ops.inputs import AttentionInputs, GradientInputs

from .cases import BACKWARD, FORWARD, OpCase
from .harness import Call, interleaved_times, release
from .implementations import Inputs
from .report import Record, rounded

# Numbers of segments by number of heads of 128; twice as many for heads of 64, two of which share a multiprocessor.
COUNTS = {1: (1, 8, 16, 32, 48, 64, 100, 132), 8: (1, 4, 6, 8, 12, 16), 16: (1, 3, 4, 6, 8), 32: (1, 2, 3, 4)}
LENGTHS = (2048, 8192, 32_768)
LONG = {(1, 131_072, 16): [2, 4, 8], (1, 1 << 20, 1): [32, 66, 132], (2, 1 << 20, 8): [2, 4, 8]}
# Numbers of segments by packed sequences in 32,768 tokens, and heads of 128.
PACKED = {(20, 16): [2, 4, 8], (20, 32): [1, 2, 3, 4], (20, 64): [1, 2], (4, 32): [1, 2, 3, 4], (4, 64): [1, 2]}

# Heads of 128, as many as multiprocessors or more.
MANY = 128, 136, 160, 192, 264, 320, 512


def cases() -> Iterator[tuple[OpCase, list[int]]]:
    """Cases of few heads, and their numbers of segments."""
    for head_dim in (128, 64):
        for num_heads, counts in COUNTS.items():
            for length in LENGTHS:
                scaled = {count * (128 // head_dim) if count > 1 else 1 for count in counts}
                fitting = sorted(count for count in scaled if count * config.C <= length)
                yield OpCase(1, length, num_heads, head_dim, torch.bfloat16), fitting
    for (batch_size, length, num_heads), counts in LONG.items():
        yield OpCase(batch_size, length, num_heads, 128, torch.bfloat16), counts
    for (sequences, num_heads), counts in PACKED.items():
        yield OpCase(1, max(LENGTHS), num_heads, 128, torch.bfloat16, sequences), counts


def cases_of_many_heads() -> Iterator[OpCase]:
    """Cases of as many heads as multiprocessors, and of more, which may leave the last wave of programs half empty."""
    for head_dim in (128, 64):
        for num_heads in MANY:
            for length in (1024, *LENGTHS):
                yield OpCase(1, length, num_heads * (128 // head_dim), head_dim, torch.bfloat16)


@torch.no_grad()
def measure(case: OpCase, counts: list[int], device: torch.device) -> Record:
    """Milliseconds of forward and backward as chosen, with the portable kernels, and in every number of segments."""
    inputs = Inputs(case, device)
    q, k, v = inputs.qkv
    x = AttentionInputs(q, k, v, inputs.log_decay, None, inputs.cu_seqlens)
    from lightning_attention.ops.hopper import launch as hopper
    from lightning_attention.ops.triton import launch as portable

    passes = {
        FORWARD: lambda cut: partial(call, partial(scans.forward, cut), x, 1.0, False),
        BACKWARD: lambda cut: partial(call, partial(scans.backward, cut), GradientInputs(*x, inputs.do, None), 1.0),
    }
    record: Record = {
        "batch_size": case.batch_size,
        "length": case.length,
        "num_heads": case.num_heads,
        "head_dim": case.head_dim,
        "documents": case.packed_sequences,
        "chosen": [_chosen_count(call_of) for call_of in passes.values()],
    }
    for direction, call_of in passes.items():
        calls: dict[str, Call] = {"chosen": call_of(hopper.Scans), "portable": call_of(portable.Scans)}
        calls |= {str(count): call_of(_scans_of(count)) for count in counts}
        times, failures = interleaved_times(calls, 0.012, device)
        if failures:
            raise RuntimeError(f"{case} failed: {failures}")
        record[f"{direction.name}_milliseconds"] = {name: rounded(1e3 * time) for name, time in times.items()}
    release(device)
    return record


def _scans_of(count: int) -> type[scans.Scans]:
    """Scans of Hopper's kernels over `count` segments."""
    from lightning_attention.ops.hopper.launch import Scans

    class Cut(Scans):
        def cut(self) -> Segments:
            if count == 2:
                return config.two_segments(self.T, self.mean_sequence_length)
            segment = ceil_div(self.T, count * config.C) * config.C
            return Segments(segment, segment, ceil_div(self.T, segment))

    return Cut


def _chosen_count(call_of: Callable[[type[scans.Scans]], Call]) -> int:
    """Number of segments that the cost model chooses for a call."""
    from lightning_attention.ops.hopper.launch import Scans

    chosen = []

    class Observed(Scans):
        def cut(self) -> Segments:
            chosen.append(super().cut())
            return chosen[-1]

    call_of(Observed)()
    return chosen[0].count
