"""Training steps of several processes, one a GPU, beside the steps of one process, in one run."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from lightning_attention.distributed.exchange import STRATEGIES
from lightning_attention.distributed.parallel import SequenceParallel
from lightning_attention.models import LightningConfig, LightningForCausalLM, compile_layers

from .harness import release
from .report import Record, rounded
from .speed import Steps, measure_steps, training_step

ONE, DATA, SHARDED = "one process", "data parallel", "sharded (FSDP2)"


@dataclass(frozen=True)
class ParallelCase:
    """Steps of a model, of as many tokens on each process, in sequences of `length` tokens.

    With sequence parallelism the processes share one sequence of all their tokens.
    """

    size: str
    tokens: int
    length: int
    kinds: tuple[str, ...]

    @property
    def shares_sequences(self) -> bool:
        return self.kinds[0] not in (DATA, SHARDED)


def cases(
    size: str, sharded_size: str, tokens: int, sharded_tokens: int, sequence_tokens: int, length: int
) -> Iterator[ParallelCase]:
    """Data parallelism, sharding, and sequence parallelism with every strategy; each beside one process."""
    yield ParallelCase(size, tokens, length, (DATA,))
    yield ParallelCase(sharded_size, sharded_tokens, length, (SHARDED,))
    yield ParallelCase(size, sequence_tokens, sequence_tokens, tuple(map(_sharing, STRATEGIES)))


def measure(cases: list[ParallelCase], device_type: str, processes: int, *, compiled: bool, steps: int) -> list[Record]:
    """Measure steps with AdamW, in bfloat16 autocast on a GPU.

    Returns:
        Of every case, one process alone and then all of them: `seconds` of a step, the mean of `steps` steps that
        follow each other; `tokens_per_second` of a process; `of_one_process`, that over the tokens per second of one
        process; and `peak_bytes` of the first process, with weights, gradients and moments.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (processes, device_type, cases, compiled, steps, folder)
        spawn(_work, arguments, nprocs=processes)
        return json.loads((Path(folder) / "results.json").read_text())


def _work(
    rank: int, processes: int, device_type: str, cases: list[ParallelCase], compiled: bool, steps: int, folder: str
) -> None:
    """Measure as one of the processes; the first one writes the results."""
    device = torch.device(f"cuda:{rank}" if device_type == "cuda" else device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    on_hosts: Any = dist.new_group(backend="gloo")
    records: list[Record] = []
    for case in cases:
        alone = None
        for kind in (ONE, *case.kinds):
            dist.barrier(on_hosts)
            if kind != ONE or rank == 0:
                found = _measure(case, kind, device, compiled, steps)
                alone = found if kind == ONE else alone
                if rank == 0 and alone is not None:
                    records.append(_record(case, kind, 1 if kind == ONE else processes, found, alone))
            torch.compiler.reset()
            release(device)
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps(records))
    dist.destroy_process_group()


def _measure(case: ParallelCase, kind: str, device: torch.device, compiled: bool, steps: int) -> Steps:
    torch.manual_seed(0)
    with device:
        model = LightningForCausalLM(LightningConfig.from_size(case.size)).train()
    parallel = next((SequenceParallel(strategy=name) for name in STRATEGIES if kind == _sharing(name)), None)
    model.model.set_sequence_parallel(parallel)
    if compiled:
        compile_layers(model)
    wrapped: Any = model
    if kind == SHARDED:
        from lightning_attention.training.processes import shard

        shard(model, device.type)
    elif kind != ONE:
        ids = [device.index] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = _inputs(case, parallel, model.config.vocab_size, device)
    return measure_steps(training_step(wrapped, inputs, device, dtype), device, steps)


def _inputs(
    case: ParallelCase, parallel: SequenceParallel | None, vocab_size: int, device: torch.device
) -> dict[str, Any]:
    """Random tokens of this process, as batch rows, or as its slice of one sequence."""
    if parallel is None:
        tokens = torch.randint(vocab_size, (case.tokens // case.length, case.length), device=device)
        return {"input_ids": tokens, "labels": tokens, "skip_logits": True}
    total = case.tokens * parallel.size
    mine = parallel.slice(total)
    labels = torch.randint(vocab_size, (1, case.tokens), device=device)
    return {
        "input_ids": torch.randint(vocab_size, (1, case.tokens), device=device),
        "position_ids": torch.arange(mine.start, mine.stop, device=device)[None],
        "cu_seqlens": torch.tensor([0, total]),
        "labels": labels,
        "shift_labels": labels,
        "skip_logits": True,
    }


def _record(case: ParallelCase, kind: str, processes: int, found: Steps, alone: Steps) -> Record:
    return {
        "kind": kind,
        "processes": processes,
        "size": case.size,
        "tokens_of_a_process": case.tokens,
        "length": case.tokens * processes if case.shares_sequences else case.length,
        "seconds": rounded(found.seconds),
        "tokens_per_second": rounded(case.tokens / found.seconds),
        "of_one_process": rounded(alone.seconds / found.seconds),
        "peak_bytes": found.peak_bytes,
        "first_seconds": rounded(found.first_seconds),
    }


def _sharing(strategy: str) -> str:
    return f"sequence parallel ({strategy})"
