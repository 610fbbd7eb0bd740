"""Every attention in the same language model: training, decoding, and what it learns from the same text."""

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
from lightning_attention.models import LightningCache, LightningForCausalLM
from lightning_attention.models.cache import KeyValueLayer
from lightning_attention.models.mixers import attention_options
from lightning_attention.paths import PathLike, to_path
from lightning_attention.training import TrainingOptions, train
from lightning_attention.training.folder import METRICS

from .harness import Call, Comparison, captured
from .plot import short
from .report import Column, Document, Record, Table, field, mebibytes, rounded
from .run import Benchmark
from .speed import Step, Steps, compare_steps, config_of, random_step

TRAINING, DECODING, LOSS = KINDS = ("mixers-training", "mixers-decoding", "mixers-loss")


@dataclass(frozen=True)
class StepCase:
    """Training steps, or a decoded token.

    Attributes:
        attentions: what to compare, as `TrainingOptions` takes it.
        size: size of the model; "demo" reads bytes.
        length: tokens of a sequence of a step, or of the context before the token.
        tokens: tokens of a step, at least one sequence.
    """

    attentions: tuple[str, ...]
    size: str
    length: int
    tokens: int = 0

    @property
    def batch_size(self) -> int:
        return max(self.tokens // self.length, 1)


@dataclass(frozen=True)
class LossCase:
    """A model trained on Python's standard library, as bytes, in steps of 8 sequences of 1024 tokens."""

    attention: str
    size: str
    steps: int


def training_benchmark(
    cases: Sequence[StepCase], device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> Benchmark:
    """Measure `tokens_per_second` and `peak_bytes` of training steps, see `compare_steps`."""

    def measure(case: StepCase, bandwidth: float) -> list[Record]:
        makers = {name: partial(_step, case, name, device, dtype, compiled) for name in case.attentions}
        comparison = compare_steps(makers, device, steps=3)
        tokens = case.batch_size * case.length

        def results(name: str, prepared: Steps) -> Record:
            return {"tokens_per_second": rounded(tokens / prepared.seconds), "peak_bytes": prepared.peak_bytes}

        sizes = {"size": case.size, "length": case.length, "batch_size": case.batch_size, "compiled": compiled}
        return comparison.records(sizes, results)

    columns = [Column("tokens/s", 12, field("tokens_per_second"), ".4g")]
    columns.append(Column("memory, MiB", 13, mebibytes("peak_bytes"), ".4g"))
    return Benchmark(TRAINING, cases, measure, _title, Table({"": columns}))


def decoding_benchmark(
    cases: Sequence[StepCase], device: torch.device, dtype: torch.dtype, *, seconds: float
) -> Benchmark:
    """Measure a token of one sequence after a context: `milliseconds`, and `state_bytes` of its cache.

    The attentions take turns. A GPU replays the token as a CUDA graph, without launches by the host.
    """

    def measure(case: StepCase, bandwidth: float) -> list[Record]:
        comparison: Comparison[tuple[Call, LightningCache]] = Comparison(device)
        for attention in case.attentions:
            comparison.prepare(attention, partial(_decoding, case, attention, device, dtype))
        times = comparison.times(lambda prepared: prepared[0], seconds)

        def results(name: str, prepared: tuple[Call, LightningCache]) -> Record:
            return {"milliseconds": rounded(1e3 * times[name]), "state_bytes": prepared[1].nbytes()}

        return comparison.records({"size": case.size, "length": case.length}, results)

    columns = [Column("ms a token", 12, field("milliseconds"), ".4g")]
    columns.append(Column("state, MiB", 12, mebibytes("state_bytes"), ".4g"))
    return Benchmark(DECODING, cases, measure, _title, Table({"": columns}))


def loss_benchmark(cases: Sequence[LossCase], device: torch.device) -> Benchmark:
    """Measure `held_out_loss`, in nats a byte, of a model after `trained_tokens`."""

    def measure(case: LossCase, bandwidth: float) -> list[Record]:
        comparison: Comparison[Record] = Comparison(device)
        comparison.prepare(case.attention, lambda: _learning(case))
        return comparison.records({"size": case.size}, lambda name, record: record)

    columns = [Column("nats a byte", 13, field("held_out_loss"), ".4g")]
    return Benchmark(LOSS, cases, measure, lambda case, _: f"{case.size}, {case.steps} steps", Table({"": columns}))


def _model(case: StepCase, attention: str, device: torch.device) -> LightningForCausalLM:
    torch.manual_seed(0)
    options = attention_options(attention) | {"max_position_embeddings": case.length + 1}
    with device:
        return LightningForCausalLM(config_of(case.size, **options))


def _step(case: StepCase, attention: str, device: torch.device, dtype: torch.dtype, compiled: bool) -> Step:
    model = _model(case, attention, device).train()
    return random_step(model, case.batch_size, case.length, device, dtype, compiled=compiled)


@torch.no_grad()
def _decoding(case: StepCase, attention: str, device: torch.device, dtype: torch.dtype) -> tuple[Call, LightningCache]:
    """Read a context, and return a function that decodes the token after it, and the cache."""
    model = _model(case, attention, device).to(dtype).eval()
    cache, token = LightningCache(model.config.num_hidden_layers), torch.zeros(1, 1, dtype=torch.int64, device=device)
    model(torch.randint(model.config.vocab_size, (1, case.length), device=device), cache=cache, logits_to_keep=1)
    before = torch.full((1,), case.length, device=device)
    key_values = [layer.key_values for layer in cache.layers if isinstance(layer, KeyValueLayer)]

    @torch.no_grad()
    def step() -> object:
        cache.length, cache.positions = case.length, before
        for kept in key_values:
            kept.lengths, kept.longest = before, case.length
        return model(token, cache=cache)

    step()  # makes room for the token's key and value
    return (captured(step) if device.type == "cuda" else step), cache


def _learning(case: LossCase) -> Record:
    """Loss on held-out text of a model trained by `train` on Python's standard library."""
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingOptions(
            Path(folder) / "run",
            size=case.size,
            attention=case.attention,
            steps=case.steps,
            eval_every=case.steps,
            save_every=case.steps,
        )
        train(options, console=Console(quiet=True))
        lines = (options.output / METRICS).read_text().splitlines()
    losses = [record["eval_loss"] for line in lines if "eval_loss" in (record := json.loads(line))]
    tokens = options.batch_size * options.sequence_length * options.steps
    return {"held_out_loss": rounded(losses[-1]), "trained_tokens": tokens}


def plot_mixers(document: Document, picture: PathLike) -> None:
    """Draw what was measured: speed of training steps and time of a token against the length, and the loss."""
    from matplotlib.figure import Figure

    file = to_path(picture, "picture")
    kinds = [kind for kind in KINDS if kind in document["runs"]]
    figure = Figure(figsize=(5.2 * len(kinds), 4.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        records = [record for record in document["runs"][kind]["results"] if "not_measured" not in record]
        if kind == LOSS:
            _draw_losses(axes, records)
        elif kind == TRAINING:
            _draw_lengths(axes, records, "tokens_per_second", "sequence length (tokens)", "tokens/s of a training step")
        else:
            _draw_lengths(axes, records, "milliseconds", "context (tokens)", "time of a decoded token (ms)")
        axes.set_title(records[0]["size"] if records else "", fontsize=9)
    figure.suptitle(document["machine"]["device"], fontsize=10)
    with replacing(file, "wb") as content:
        figure.savefig(content, dpi=150, format=file.suffix[1:] or "png")


def _draw_lengths(axes: Any, records: list[Record], key: str, abscissa: str, ordinate: str) -> None:
    """Draw a line per attention, named at its right end; names are moved apart."""
    lengths = sorted({record["length"] for record in records})
    ends = []
    for name in dict.fromkeys(record["implementation"] for record in records):
        points = sorted((x["length"], x[key]) for x in records if x["implementation"] == name)
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", markersize=4)
        ends.append((points[-1][1], name, line.get_color(), points[-1][0]))
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short(length) for length in lengths])
    axes.set(xlabel=abscissa, ylabel=ordinate, ylim=(0, None))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(alpha=0.3)
    lowest, gap = 0.0, axes.get_ylim()[1] / 22
    for value, name, color, length in sorted(ends):
        lowest = max(value, lowest)
        text = {"textcoords": "data", "va": "center", "fontsize": 8, "color": color}
        axes.annotate(f"  {name}", (length, value), (length, lowest), annotation_clip=False, **text)
        lowest += gap
    if len(lengths) > 1:
        axes.set_xlim(None, lengths[-1] * (lengths[-1] / lengths[0]) ** 0.25)


def _draw_losses(axes: Any, records: list[Record]) -> None:
    losses = [record["held_out_loss"] for record in records]
    bars = axes.barh([record["implementation"] for record in records], losses)
    axes.bar_label(bars, [f" {loss:.3g}" for loss in losses], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="loss on held-out text (nats a byte)", xlim=(0, 1.15 * max(losses, default=1)))


def _title(case: StepCase, bandwidth: float) -> str:
    return f"{case.size}, {case.length} tokens"
