"""Time against the number of segments with few heads, to which the cost model in `ops/hopper/config.py` is fitted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch

from lightning_attention.ops import hopper
from lightning_attention.ops import triton as portable
from lightning_attention.ops.hopper import config
from lightning_attention.ops.triton.config import Segments, ceil_div

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

Choose = Callable[..., Segments]


def cases() -> Iterator[tuple[OpCase, list[int]]]:
    """Cases and their numbers of segments."""
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


@torch.no_grad()
def measure(case: OpCase, counts: list[int], device: torch.device) -> Record:
    """Milliseconds of forward and backward as chosen, with the portable kernels, and in every number of segments."""
    inputs = Inputs(case, device)
    (q, k, v), do, log_decay, cu_seqlens = inputs.qkv, inputs.do, inputs.log_decay, inputs.cu_seqlens
    passes = {
        FORWARD: lambda backend: backend.forward(q, k, v, log_decay, None, cu_seqlens, 1.0, False),
        BACKWARD: lambda backend: backend.backward(q, k, v, do, log_decay, None, None, cu_seqlens, 1.0),
    }
    record: Record = {
        "batch_size": case.batch_size,
        "length": case.length,
        "num_heads": case.num_heads,
        "head_dim": case.head_dim,
        "documents": case.packed_sequences,
        "chosen": [_chosen_count(partial(call, hopper)) for call in passes.values()],
    }
    for direction, call in passes.items():
        calls: dict[str, Call] = {
            "chosen": partial(call, hopper),
            "portable": partial(call, portable),
        }
        calls |= {str(count): _with_segments(count, calls["chosen"]) for count in counts}
        times, failures = interleaved_times(calls, 0.012, device)
        if failures:
            raise RuntimeError(f"{case} failed: {failures}")
        record[f"{direction.name}_milliseconds"] = {name: rounded(1e3 * time) for name, time in times.items()}
    release(device)
    return record


@contextmanager
def _segments_from(choose: Choose) -> Iterator[None]:
    with patch.object(config, "segments", choose):
        yield


def _with_segments(count: int, call: Call) -> Call:
    """Call with every tensor in `count` segments."""

    def choose(length: int, sequence: int, *_: object, **__: object) -> Segments:
        if count == 2:
            return config.two_segments(length, sequence)
        segment = ceil_div(length, count * config.C) * config.C
        return Segments(segment, segment, ceil_div(length, segment))

    def run() -> object:
        with _segments_from(choose):
            return call()

    return run


def _chosen_count(call: Call) -> int:
    """Number of segments that the cost model chooses for a call."""
    chosen, choose = [], config.segments

    def recorded(*arguments: int | float, **options: bool) -> Segments:
        chosen.append(choose(*arguments, **options))
        return chosen[-1]

    with _segments_from(recorded):
        call()
    return chosen[0].count
