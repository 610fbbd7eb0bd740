"""Every attention in the same language model: training, decoding, and what it learns from the same text."""

import gc
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lightning_attention.files import replacing
from lightning_attention.models import LightningCache, LightningConfig, LightningForCausalLM, compile_layers
from lightning_attention.models.cache import KeyValueLayer
from lightning_attention.models.mixers import attention_options
from lightning_attention.paths import PathLike, to_path
from lightning_attention.training import TrainingOptions, train
from lightning_attention.training.folder import METRICS

from .harness import Comparison, interleaved_times, release
from .report import Column, Document, Record, Table, rounded
from .run import Benchmark
from .speed import measure_steps


@dataclass(frozen=True)
class MixerCase:
    """An attention, and what to measure of it.

    Attributes:
        attention: as `TrainingOptions` takes it.
        size: size of the model that is timed.
        lengths: tokens of a sequence of a training step, and of a context before a decoded token.
        tokens: tokens of a training step, at least one sequence.
        trained_size: size of the model that is trained on Python's standard library, as bytes.
        steps: its steps, of 8 sequences of 1024 tokens; 0 trains none.
    """

    attention: str
    size: str
    lengths: tuple[int, ...]
    tokens: int
    trained_size: str
    steps: int

    def config(self) -> LightningConfig:
        options = attention_options(self.attention) | {"max_position_embeddings": max(self.lengths) + 1}
        return LightningConfig.from_size(self.size, **options)


def benchmark(
    cases: Sequence[MixerCase], device: torch.device, dtype: torch.dtype, *, compiled: bool, seconds: float
) -> Benchmark:
    def measure_case(case: MixerCase, bandwidth: float) -> list[Record]:
        return measure(case, device, dtype, compiled=compiled, seconds=seconds)

    return Benchmark("mixers", cases, measure_case, _title, table(cases[0].lengths))


def measure(
    case: MixerCase, device: torch.device, dtype: torch.dtype, *, compiled: bool, seconds: float
) -> list[Record]:
    """Measure a case.

    Returns:
        A record with `training`, by length `tokens_per_second` and `peak_bytes` of a step; `decoding`, by length of the
        context `milliseconds` of a token and `state_bytes` of its state; and `held_out_loss`, in nats a byte, after
        `trained_tokens`. What raises has `not_measured` in its place.
    """
    sizes = {"attention": case.attention, "size": case.size, "compiled": compiled}
    comparison: Comparison[Record] = Comparison(device)
    comparison.prepare(
        case.attention,
        lambda: {
            "training": {str(length): _training(case, length, device, dtype, compiled) for length in case.lengths},
            "decoding": {str(length): _decoding(case, length, device, dtype, seconds) for length in case.lengths},
            **(_learning(case) if case.steps else {}),
        },
    )
    return comparison.records(sizes, lambda name, record: record)


def _model(case: MixerCase, device: torch.device) -> LightningForCausalLM:
    torch.manual_seed(0)
    with device:
        return LightningForCausalLM(case.config())


def _training(case: MixerCase, length: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> Record:
    model = _model(case, device).train()
    if compiled:
        compile_layers(model)
    batch_size = max(case.tokens // length, 1)
    tokens = torch.randint(model.config.vocab_size, (batch_size, length), device=device)
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False, "skip_logits": True}
    try:
        found = measure_steps(model, inputs, device, dtype, steps=3)
    except torch.OutOfMemoryError:
        return {"not_measured": "out of memory"}
    finally:
        del model
        gc.collect()
        torch.compiler.reset()
        release(device)
    return {"tokens_per_second": rounded(batch_size * length / found.seconds), "peak_bytes": found.peak_bytes}


@torch.no_grad()
def _decoding(case: MixerCase, length: int, device: torch.device, dtype: torch.dtype, seconds: float) -> Record:
    """A token of one sequence after a context, by `forward` with a cache, as transformers' generate() makes it."""
    model = _model(case, device).to(dtype).eval()
    cache, token = LightningCache(model.config.num_hidden_layers), torch.zeros(1, 1, dtype=torch.int64, device=device)
    model(torch.randint(model.config.vocab_size, (1, length), device=device), cache=cache, logits_to_keep=1)

    keys_and_values = [layer.key_values for layer in cache.layers if isinstance(layer, KeyValueLayer)]

    def step() -> None:
        cache.length, cache.positions = length, torch.full((1,), length, device=device)
        for kept in keys_and_values:
            kept.lengths, kept.longest = cache.positions, length
        model(token, cache=cache)

    times, failures = interleaved_times({"step": step}, seconds, device, "wall")
    if failures:
        return {"not_measured": failures["step"]}
    return {"milliseconds": rounded(1e3 * times["step"]), "state_bytes": cache.nbytes()}


def _learning(case: MixerCase) -> Record:
    """Loss on held-out text of a model trained by `train` on Python's standard library."""
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingOptions(
            Path(folder) / "run",
            size=case.trained_size,
            attention=case.attention,
            steps=case.steps,
            eval_every=case.steps,
            save_every=case.steps,
        )
        train(options, console=Console(quiet=True))
        lines = (options.output / METRICS).read_text().splitlines()
    losses = [record["eval_loss"] for line in lines if "eval_loss" in (record := json.loads(line))]
    tokens = options.batch_size * options.sequence_length * options.steps
    return {"held_out_loss": rounded(losses[-1]), "trained_tokens": tokens, "trained_size": case.trained_size}


def plot_mixers(document: Document, picture: PathLike) -> None:
    """Draw tokens per second of a training step against the length, and the loss on held-out text."""
    from matplotlib.figure import Figure

    records = [record for record in document["runs"]["mixers"]["results"] if "not_measured" not in record]
    figure, file = Figure(figsize=(11, 4.6), layout="constrained"), to_path(picture, "picture")
    speed, loss = figure.subplots(1, 2)
    for record in records:
        points = [(int(n), x["tokens_per_second"]) for n, x in record["training"].items() if "tokens_per_second" in x]
        speed.plot(*zip(*points, strict=True), marker="o", markersize=4, label=record["attention"])
    speed.set_xscale("log", base=2)
    speed.set(xlabel="sequence length (tokens)", ylabel="tokens per second of a training step", ylim=(0, None))
    speed.grid(alpha=0.3)
    speed.legend(fontsize=8)
    learned = [record for record in records if "held_out_loss" in record]
    loss.barh([record["attention"] for record in learned], [record["held_out_loss"] for record in learned])
    loss.invert_yaxis()
    loss.set(xlabel="loss on held-out text (nats a byte)")
    if learned:
        lowest = min(record["held_out_loss"] for record in learned)
        loss.set_xlim(0.9 * lowest)
        loss.set_title(f"{learned[0]['trained_size']}, {learned[0]['trained_tokens']:,} bytes", fontsize=9)
    if records:
        figure.suptitle(f"size {records[0]['size']}, {document['machine']['device']}", fontsize=10)
    with replacing(file, "wb") as content:
        figure.savefig(content, dpi=150, format=file.suffix[1:] or "png")


def _title(case: MixerCase, bandwidth: float) -> str:
    return f"{case.size}, {case.attention}"


def table(lengths: Sequence[int]) -> Table:
    """Columns for training and decoding at every length, and for the loss."""

    def entry(group: str, length: int, key: str, scale: float, record: Record) -> float | None:
        found: Any = record[group][str(length)].get(key)
        return None if found is None else found * scale

    def columns(group: str, key: str, scale: float = 1.0) -> list[Column]:
        return [Column(str(n), 12, partial(entry, group, n, key, scale), ".4g") for n in lengths]

    return Table(
        {
            "training, tokens/s": columns("training", "tokens_per_second"),
            "decoding, ms": columns("decoding", "milliseconds"),
            "state, MiB": columns("decoding", "state_bytes", 2**-20)[-1:],
            "": [Column("loss", 8, lambda record: record.get("held_out_loss"), ".4g")],
        }
    )
