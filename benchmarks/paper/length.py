"""Loss against the position in a document, beyond the length of training."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attention.models import LightningCache, LightningConfig, LightningForCausalLM
from lightning_attention.models.checkpoint import last_checkpoint, load_model
from lightning_attention.training import Corpus, load_tokenizer
from lightning_attention.training.batches import pack_sequences, shuffled_epochs
from lightning_attention.training.folder import CORPUS

from ..harness import Comparison
from ..report import Column, Record, Table
from ..run import Benchmark
from .fit import fit
from .learning import slug, texts
from .models import QUALITY

KIND = "paper-length"
SINKS = 4  # first tokens that StreamingLLM keeps
BLOCK = 4096  # positions whose logits are in memory at a time
LIGHTNING, HYBRID, LLAMA, *_ = (row.name for row in QUALITY)
INTERPOLATED, STREAMING = "LLaMA, Position Interpolation", "LLaMA, StreamingLLM"


@dataclass(frozen=True)
class LengthCase:
    """Documents to read, and the models that read them.

    Attributes:
        runs: folder in which `paper learn` has kept the models of the table of quality.
        corpus: folder of the text.
        length: tokens of a document.
        documents: number of documents.
        tuning_steps: steps on `length` tokens after Position Interpolation.
        tuning_tokens: tokens of such a step.
        dtype: "bfloat16" or "float32".
    """

    runs: Path
    corpus: Path
    length: int
    documents: int
    tuning_steps: int
    tuning_tokens: int
    dtype: str

    def checkpoint(self, name: str) -> Path:
        return last_checkpoint(self.runs / slug(name))


Losses = Callable[[LightningForCausalLM, Tensor, str], Tensor]


def benchmark(case: LengthCase, device: torch.device) -> Benchmark:
    """Measure the mean loss of a token by its position, in nats, of documents that were not trained on."""
    ids = documents(case).to(device)
    systems: dict[str, tuple[Callable[[], LightningForCausalLM], Losses]] = {
        name: (lambda name=name: load_model(case.checkpoint(name)), whole_losses) for name in (LIGHTNING, HYBRID, LLAMA)
    }
    systems[INTERPOLATED] = (lambda: _interpolated(case, device), whole_losses)
    systems[STREAMING] = (lambda: load_model(case.checkpoint(LLAMA)), streaming_losses)
    spans = ranges(case.length)

    def measure(system: str, bandwidth: float) -> list[Record]:
        load, losses = systems[system]
        comparison: Comparison[Tensor] = Comparison(device)
        comparison.prepare(system, lambda: losses(load().to(device).eval(), ids, case.dtype).cpu())

        def results(name: str, by_position: Tensor) -> Record:
            means = {f"{first}-{last}": by_position[first - 1 : last].mean().item() for first, last in spans}
            return {"loss": {positions: round(mean, 4) for positions, mean in means.items()}}

        return comparison.records({"length": case.length, "documents": len(ids)}, results)

    columns = [
        Column(str(last), 9, lambda record, key=f"{first}-{last}": record["loss"][key], ".4g") for first, last in spans
    ]
    return Benchmark(KIND, list(systems), measure, lambda system, _: system, Table({"loss up to position": columns}))


def ranges(length: int) -> list[tuple[int, int]]:
    """Ranges of positions that double, first and last included; position 0 is not predicted."""
    edges = [edge for i in range(8, 30) if (edge := 1 << i) < length] + [length]
    return [(first, last - 1) for first, last in zip([1, *edges[:-1]], edges, strict=True)]


def documents(case: LengthCase) -> Tensor:
    """The first tokens of documents of validation and test text, `[documents, length]`.

    Raises:
        ValueError: fewer documents are as long.
    """
    tokenizer = load_tokenizer(case.checkpoint(LIGHTNING))
    found = []
    for split in ("test", "validation"):
        for text in texts(case.corpus / f"{split}.jsonl"):
            if len(text) >= case.length and len(ids := tokenizer(text).input_ids) >= case.length:
                found.append(torch.tensor(ids[: case.length]))
    if len(found) < case.documents:
        raise ValueError(f"{len(found)} documents have {case.length} tokens, {case.documents} are asked for")
    return torch.stack(found[: case.documents])


@torch.no_grad()
def whole_losses(model: LightningForCausalLM, ids: Tensor, dtype: str) -> Tensor:
    """Mean losses of tokens 1 … T - 1 of documents `[N, T]`, each read at once."""
    total = torch.zeros(ids.shape[1] - 1, device=ids.device)
    for row in ids:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = model.model(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1]
            for start in range(0, len(hidden), BLOCK):
                logits = model.lm_head(hidden[start : start + BLOCK]).float()
                targets = row[1 + start : 1 + start + len(logits)]
                total[start : start + BLOCK] += F.cross_entropy(logits, targets, reduction="none")
    return total / len(ids)


@torch.no_grad()
def streaming_losses(model: LightningForCausalLM, ids: Tensor, dtype: str) -> Tensor:
    """Mean losses as of `whole_losses`, with keys and values of as many tokens as the model was trained on."""
    cache = LightningCache(model.config.num_hidden_layers, sinks=SINKS, window=trained_length(model.config) - SINKS)
    losses = []
    for t in range(ids.shape[1] - 1):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(ids[:, t : t + 1], cache=cache).logits[:, 0].float()
        losses.append(F.cross_entropy(logits, ids[:, t + 1]))
    return torch.stack(losses)


def trained_length(config: LightningConfig) -> int:
    """Tokens of a sequence that a model of the table of quality was trained on."""
    length = config.max_position_embeddings
    assert length is not None
    return length


def _interpolated(case: LengthCase, device: torch.device) -> LightningForCausalLM:
    """The softmax model with positions scaled to the length it was trained for, and trained some steps more."""
    checkpoint = case.checkpoint(LLAMA)
    trained = trained_length(LightningConfig.from_pretrained(checkpoint))
    options: dict[str, Any] = {"rope_type": "linear", "factor": case.length / trained}
    model: Any = LightningForCausalLM.from_pretrained(
        checkpoint, rope_parameters=options, max_position_embeddings=case.length, dtype=torch.float32
    )
    fit(model.to(device), _batches(case), steps=case.tuning_steps, learning_rate=2e-4, dtype=case.dtype)
    return model


def _batches(case: LengthCase) -> Iterator[dict[str, Tensor]]:
    """Training text of the run, in sequences of the length to read."""
    dataset = Corpus.open(case.runs / slug(LLAMA) / CORPUS).training_set(case.length)
    order = shuffled_epochs(len(dataset), seed=0)
    while True:
        yield pack_sequences([dataset[i] for i in islice(order, max(case.tuning_tokens // case.length, 1))])
