"""Training step of a model against the length of its one sequence, in training segments and at once."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from lightning_attention.models import LightningConfig, LightningForCausalLM, compile_layers
from lightning_attention.training import segmented_loss

from .cases import TrainingCase
from .harness import Comparison, peak_bytes
from .report import OURS, Column, Record, Table, field, mebibytes, rounded, times_ours
from .run import Benchmark
from .scaling import num_parameters

Loss = Callable[[torch.nn.Module, Tensor, TrainingCase], Tensor]


def in_segments(model: torch.nn.Module, input_ids: Tensor, case: TrainingCase) -> Tensor:
    return segmented_loss(model, input_ids, segment_length=case.segment_length)


def at_once(model: torch.nn.Module, input_ids: Tensor, case: TrainingCase) -> Tensor:
    input_ids = input_ids.to(next(model.parameters()).device)
    return model(input_ids, labels=input_ids, use_cache=False, skip_logits=True).loss


# Losses by name, and the largest number of training segments to measure.
LOSSES: dict[str, tuple[Loss, float]] = {OURS: (in_segments, float("inf")), "as a whole": (at_once, 4)}


class Trainer:
    """Training steps with AdamW in autocast.

    Args:
        model: model in training mode.
        dtype: dtype of the autocast; float32 for none.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=self.device.type == "cuda")

    def step(self, loss_of: Loss, input_ids: Tensor, case: TrainingCase) -> float:
        """Run a step, until the device has finished; return the loss."""
        self.optimizer.zero_grad(set_to_none=False)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = loss_of(self.model, input_ids, case)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def random_model(size: str, device: torch.device, *, compiled: bool) -> torch.nn.Module:
    """Create a model of a size in `SIZES` with random weights, in training mode, with compiled layers or not."""
    torch.manual_seed(0)
    model = LightningForCausalLM(LightningConfig.from_size(size)).to(device).train()
    if compiled:
        compile_layers(model)
    return model


def benchmark(
    cases: list[TrainingCase], size: str, device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> Benchmark:
    """Measure `LOSSES` on a random model, created for the first case."""
    trainer = cache(lambda: Trainer(random_model(size, device, compiled=compiled), dtype))

    def measure_case(case: TrainingCase, bandwidth: float) -> list[Record]:
        return measure(case, trainer(), size, LOSSES)

    return Benchmark("train", cases, measure_case, _title, _TABLE, max(_needed_bytes(size, case) for case in cases))


def _needed_bytes(size: str, case: TrainingCase) -> int:
    """Least memory: float32 weights, gradients and two moments, ids, and the input of every layer for a segment."""
    config = LightningConfig.from_size(size)
    activations = min(case.length, case.segment_length) * config.num_hidden_layers * config.hidden_size
    return 16 * num_parameters(config) + torch.int64.itemsize * case.length + 2 * activations


def measure(case: TrainingCase, trainer: Trainer, size: str, losses: dict[str, tuple[Loss, float]]) -> list[Record]:
    """Measure a case.

    Args:
        case: lengths of the sequence and of a training segment.
        trainer: trainer of the model.
        size: name of the model's size, to record.
        losses: losses by name, and the largest number of segments to measure.

    Returns:
        Sizes of the case and results of every loss: `loss`; `seconds` of one step, after a warm-up step on two
        segments; `tokens_per_second`; `times_ours`; `peak_bytes` of the step beyond parameters, gradients and moments.
        What raises, or is left out, has `not_measured`, the reason, in place of results.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    vocab_size = LightningConfig.from_size(size).vocab_size
    input_ids = torch.randint(vocab_size, (1, case.length), generator=generator, device="cpu")
    comparison: Comparison[_Step] = Comparison(trainer.device)
    for name, (loss_of, max_segments) in losses.items():
        if case.num_segments > max_segments:
            comparison.leave_out(name, f"not run beyond {max_segments} segments")
        else:
            comparison.prepare(name, partial(_step, trainer, loss_of, input_ids, case))
    times = {name: step.seconds for name, step in comparison.prepared.items()}

    def results(name: str, step: _Step) -> Record:
        return {
            "loss": rounded(step.loss),
            "seconds": rounded(step.seconds),
            "tokens_per_second": rounded(case.length / step.seconds),
            "times_ours": times_ours(times, name),
            "peak_bytes": step.peak_bytes,
        }

    sizes = {"size": size, "length": case.length, "segment_length": case.segment_length}
    return comparison.records(sizes, results)


@dataclass(frozen=True)
class _Step:
    loss: float
    seconds: float
    peak_bytes: int | None


def _step(trainer: Trainer, loss_of: Loss, input_ids: Tensor, case: TrainingCase) -> _Step:
    loss = seconds = 0.0

    def timed() -> None:
        nonlocal loss, seconds
        start = time.perf_counter()
        loss = trainer.step(loss_of, input_ids, case)
        seconds = time.perf_counter() - start

    trainer.step(loss_of, input_ids[:, : 2 * case.segment_length], case)
    peak = peak_bytes(timed, trainer.device)
    return _Step(loss, seconds, peak)


def _title(case: TrainingCase, bandwidth: float) -> str:
    return f"{case.length} tokens, segments of {case.segment_length}"


_TABLE = Table(
    {
        "": [
            Column("seconds", 11, field("seconds"), ".3g"),
            Column("tokens/s", 11, field("tokens_per_second"), ".4g"),
            Column("ours", 8, field("times_ours"), ".3g", "x"),
            Column("MiB", 10, mebibytes("peak_bytes"), ".4g"),
            Column("loss", 9, field("loss"), ".4g"),
        ]
    }
)
