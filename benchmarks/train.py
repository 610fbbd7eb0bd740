"""A step of training of a whole model against the length of its one sequence, by segments and as a whole."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lightning_attention.models import LightningConfig, LightningForCausalLM
from lightning_attention.training import segmented_loss

from .cases import TrainingCase
from .harness import peak_bytes, reason, release
from .peers import OURS
from .report import Column, Record, Table, rounded
from .run import Plan
from .scaling import num_parameters

Model = Callable[[], torch.nn.Module]
Loss = Callable[[torch.nn.Module, Tensor, TrainingCase], Tensor]


def by_segments(model: torch.nn.Module, input_ids: Tensor, case: TrainingCase) -> Tensor:
    return segmented_loss(model, input_ids, segment_length=case.segment_length)


def as_a_whole(model: torch.nn.Module, input_ids: Tensor, case: TrainingCase) -> Tensor:
    input_ids = input_ids.to(next(model.parameters()).device)
    return model(input_ids, labels=input_ids, use_cache=False).loss


# Ours, and what it is beside, up to how many segments.
WAYS: dict[str, tuple[Loss, float]] = {OURS: (by_segments, float("inf")), "as a whole": (as_a_whole, 4)}


def random_model(size: str, device: torch.device, *, compiled: bool) -> torch.nn.Module:
    """A model of a size in `SIZES` with random weights, for training."""
    torch.manual_seed(0)
    model: Any = LightningForCausalLM(LightningConfig.from_size(size))
    model = model.to(device).train()
    return cast(torch.nn.Module, torch.compile(model)) if compiled else model


def plan(cases: list[TrainingCase], model: Model, size: str, device: torch.device, dtype: torch.dtype) -> Plan:
    """Of `measure` with `WAYS`; `model` is called when its turn comes."""

    def measured(bandwidth: float) -> Iterator[list[Record]]:
        return measure(cases, model(), size, WAYS, device, dtype)

    return Plan("train", cases, measured, _title, _TABLE, max(_needed_bytes(size, case) for case in cases))


def _needed_bytes(size: str, case: TrainingCase) -> int:
    """Memory at least: float32 weights, gradients and two moments, ids, and a segment's input of every layer."""
    config = LightningConfig.from_size(size)
    activations = min(case.length, case.segment_length) * config.num_hidden_layers * config.hidden_size
    return 16 * num_parameters(config) + torch.int64.itemsize * case.length + 2 * activations


def measure(
    cases: Iterable[TrainingCase],
    model: torch.nn.Module,
    size: str,
    ways: dict[str, tuple[Loss, float]],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[list[Record]]:
    """The records of one case after the other, one for every way to train.

    A record has the sizes and then `loss`; `seconds` of one step, forward, backward and AdamW, after a step over two
    segments that is not counted; `tokens_per_second`; `times_ours` of the time; and `peak_bytes` of the step beyond
    parameters, gradients and what AdamW keeps. What raises, or is left out, has `not_measured` instead.

    Args:
        cases: lengths and segments.
        model: in training mode, perhaps compiled.
        size: its name, for the records.
        ways: by name, the loss of a sequence, and how many segments at most it is asked for.
        device: of the model.
        dtype: of the autocast.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    for case in cases:
        yield _measure_case(case, model, optimizer, size, ways, device, dtype)


@dataclass(frozen=True)
class _Step:
    """What one step found."""

    loss: float
    seconds: float
    peak_bytes: int | None


def _measure_case(
    case: TrainingCase,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    size: str,
    ways: dict[str, tuple[Loss, float]],
    device: torch.device,
    dtype: torch.dtype,
) -> list[Record]:
    vocab_size = LightningConfig.from_size(size).vocab_size
    generator = torch.Generator("cpu").manual_seed(0)
    input_ids = torch.randint(vocab_size, (1, case.length), generator=generator, device="cpu")
    found: dict[str, _Step | str] = {}
    for name, (loss_of, most) in ways.items():
        if case.num_segments > most:
            found[name] = f"not run beyond {most} segments"
            continue
        try:
            found[name] = _step(case, model, optimizer, loss_of, input_ids, device, dtype)
        except Exception as error:  # whatever it raises is its result
            found[name] = reason(error)
        optimizer.zero_grad(set_to_none=False)
        release(device)
    ours = found.get(OURS)

    def record(name: str, step: _Step | str) -> Record:
        sizes = {"size": size, "length": case.length, "segment_length": case.segment_length}
        if isinstance(step, str):
            return {"implementation": name, **sizes, "not_measured": step}
        return {
            "implementation": name,
            **sizes,
            "loss": rounded(step.loss),
            "seconds": rounded(step.seconds),
            "tokens_per_second": rounded(case.length / step.seconds),
            "times_ours": rounded(step.seconds / ours.seconds) if isinstance(ours, _Step) else None,
            "peak_bytes": step.peak_bytes,
        }

    return [record(name, step) for name, step in found.items()]


def _step(
    case: TrainingCase,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Loss,
    input_ids: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> _Step:
    loss = torch.tensor(0.0, device="cpu")

    def train(input_ids: Tensor) -> None:
        nonlocal loss
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, input_ids, case)
        loss.backward()
        optimizer.step()
        loss = loss.detach()

    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        start = time.perf_counter()
        train(input_ids)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start

    train(input_ids[:, : 2 * case.segment_length])
    peak = peak_bytes(timed, device)
    return _Step(loss.item(), seconds, peak)


def _title(case: TrainingCase, bandwidth: float) -> str:
    return f"{case.length} tokens, segments of {case.segment_length}"


def _mebibytes(record: Record) -> float | None:
    return None if record["peak_bytes"] is None else record["peak_bytes"] / 2**20


_TABLE = Table(
    {
        "": [
            Column("seconds", 11, lambda record: record["seconds"], ".3g"),
            Column("tokens/s", 11, lambda record: record["tokens_per_second"], ".4g"),
            Column("ours", 8, lambda record: record["times_ours"], ".3g", "x"),
            Column("MiB", 10, _mebibytes, ".4g"),
            Column("loss", 9, lambda record: record["loss"], ".4g"),
        ]
    }
)
