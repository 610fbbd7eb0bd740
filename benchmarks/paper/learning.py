"""What models learn from the same text: perplexity of a word, bits of a byte, loss of a token."""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_attention.models import LightningForCausalLM
from lightning_attention.models.checkpoint import load_model
from lightning_attention.training import Corpus, PackedDataset, TrainingOptions, load_tokenizer, train
from lightning_attention.training.batches import num_labels, pack_sequences
from lightning_attention.training.documents import Sources
from lightning_attention.training.folder import CORPUS
from lightning_attention.training.metrics import read_metrics
from lightning_attention.training.segments import FOR_LOSS

from ..harness import Comparison
from ..report import Column, Record, Table, field, rounded
from ..run import Benchmark
from .corpus import read_splits
from .models import PaperModel

END = "<|endoftext|>"  # begins and ends a document
TOKENIZER_TEXTS = 20_000  # documents that the tokenizer is trained on
HELD_OUT = 0.01  # of the training text, for the losses that `train` reports
EVALUATED = 1 << 14  # tokens of a forward pass


@dataclass(frozen=True)
class Recipe:
    """How the models of a table are trained.

    Attributes:
        corpus: folder that `paper corpus` wrote. Tokenizer and tokens are kept in it.
        sizes: options of `LightningConfig` that say how large the models are.
        vocab_size: tokens of the vocabulary.
        length: tokens of a sequence.
        batch_size: sequences of a step.
        steps: number of steps.
        learning_rate: highest learning rate.
        seed: seed of weights and of the order of the text.
        dtype: "bfloat16" or "float32".
        test_tokens: tokens of test and of validation text to read, at most; None reads all.
    """

    corpus: Path
    sizes: dict[str, Any]
    vocab_size: int
    length: int
    batch_size: int
    steps: int
    learning_rate: float
    seed: int
    dtype: str
    test_tokens: int | None = None

    @property
    def trained_tokens(self) -> int:
        return self.steps * self.batch_size * self.length

    @property
    def tokenizer(self) -> Path:
        return self.corpus / f"bpe-{self.vocab_size}"

    @property
    def tokens(self) -> Path:
        return self.corpus / f"tokens-{self.vocab_size}-seed-{self.seed}"

    def tokens_of(self, split: str) -> Path:
        return self.corpus / f"tokens-{self.vocab_size}-{split}"

    def file(self, split: str) -> Path:
        return self.corpus / f"{split}.jsonl"


def benchmark(
    kind: str, rows: Sequence[PaperModel], recipe: Recipe, device: torch.device, *, keep: Path | None
) -> Benchmark:
    """Train models by a recipe, and measure what they have learned.

    Args:
        kind: name of the table.
        rows: the models.
        recipe: how they are trained.
        device: where.
        keep: folder for the runs, by the names of the models; None keeps none.

    Raises:
        ValueError: there is no corpus, or the folder holds a run of one of the models.
    """
    if keep is not None and (found := [path for row in rows if (path := keep / slug(row.name)).exists()]):
        raise ValueError(f"{found[0]} holds a run already: choose another folder to keep runs in")
    splits = read_splits(recipe.corpus)

    def measure(row: PaperModel, bandwidth: float) -> list[Record]:
        comparison: Comparison[Record] = Comparison(device)
        with tempfile.TemporaryDirectory() as temporary:
            folder = (keep or Path(temporary)) / slug(row.name)
            comparison.prepare(row.name, lambda: learn(row, recipe, device, folder, splits))
        sizes = {"published": row.published, "length": recipe.length, "trained_tokens": recipe.trained_tokens}
        return comparison.records(sizes | {"seed": recipe.seed, "dtype": recipe.dtype}, lambda name, record: record)

    columns = [
        Column("parameters, M", 15, field("parameters", scale=1e-6), ".4g"),
        Column("word perplexity", 17, field("word_perplexity"), ".4g"),
        Column("bits a byte", 13, field("bits_per_byte"), ".4g"),
        Column("loss", 9, field("loss"), ".5g"),
        Column("tokens/s", 11, field("tokens_per_second"), ".4g"),
        Column("GiB", 8, field("peak_bytes", scale=2**-30), ".3g"),
    ]
    return Benchmark(kind, rows, measure, lambda row, _: row.name, Table({"": columns}))


def learn(
    row: PaperModel, recipe: Recipe, device: torch.device, folder: Path, splits: dict[str, dict[str, int]]
) -> Record:
    """Train a model in a folder, and evaluate it on the test text."""
    tokenizer = prepare(recipe)
    folder.mkdir(parents=True)
    config = folder.with_suffix(".json")
    options = row.config(recipe.length, **recipe.sizes, vocab_size=recipe.vocab_size)
    config.write_text(json.dumps(options.to_diff_dict()))
    shutil.copytree(recipe.tokens, folder / CORPUS)
    torch.compiler.reset()  # or code of earlier models counts towards the limit of recompilations
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    checkpoint = train(
        TrainingOptions(
            folder,
            data=(recipe.file("train"),),
            tokenizer=str(recipe.tokenizer),
            config=config,
            sequence_length=recipe.length,
            batch_size=recipe.batch_size,
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            held_out=HELD_OUT,
            log_every=max(recipe.steps // 100, 1),
            eval_every=recipe.steps,
            eval_tokens=recipe.length,
            save_every=recipe.steps,
            dtype=recipe.dtype,
            seed=recipe.seed,
        ),
        console=Console(quiet=True),
    )
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    speeds = [x["tokens_per_second"] for x in read_metrics(folder / "metrics.jsonl") if "tokens_per_second" in x]
    model = load_model(checkpoint).to(device).eval()
    losses = {split: mean_loss(model, recipe, split, tokenizer) for split in ("validation", "test")}
    (validation, _), (loss, num_tokens) = losses["validation"], losses["test"]
    nats = loss * num_tokens
    return {
        "parameters": model.num_parameters(),
        "word_perplexity": rounded(math.exp(nats / splits["test"]["words"])),
        "bits_per_byte": rounded(nats / math.log(2) / splits["test"]["bytes"]),
        "loss": round(loss, 5),
        "validation_loss": round(validation, 5),
        "tokens_per_second": rounded(median(speeds)),
        "peak_bytes": peak,
    }


def prepare(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Make tokenizer and tokens of a corpus, unless they are there."""
    if not recipe.tokenizer.exists():
        train_tokenizer(texts(recipe.file("train")), recipe.vocab_size).save_pretrained(recipe.tokenizer)
    tokenizer = load_tokenizer(recipe.tokenizer)
    Corpus.prepare(recipe.tokens, Sources.find([recipe.file("train")], seed=recipe.seed), tokenizer, HELD_OUT)
    return tokenizer


def train_tokenizer(documents: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a BPE of bytes on the first documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(islice(documents, TOKENIZER_TEXTS), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def texts(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def mean_loss(
    model: LightningForCausalLM, recipe: Recipe, split: str, tokenizer: PreTrainedTokenizerFast
) -> tuple[float, int]:
    """Mean loss of a split's tokens in nats, in sequences of the length of training; and the number of all of them."""
    # All but the last token are in its training part.
    corpus = Corpus.prepare(recipe.tokens_of(split), Sources.find([recipe.file(split)]), tokenizer, 1e-9)
    tokens, starts = corpus.train_tokens(), corpus.document_starts()
    dataset = PackedDataset(tokens, recipe.length, starts, recipe.test_tokens)
    return loss_of(model, dataset, recipe.dtype), corpus.num_train + corpus.num_held_out


@torch.no_grad()
def loss_of(model: LightningForCausalLM, dataset: PackedDataset, dtype: str) -> float:
    """Mean loss of all predicted tokens of a dataset, in nats."""
    batch_size = max(EVALUATED // dataset.sequence_length, 1)
    losses, count = [], 0
    for start in range(0, len(dataset), batch_size):
        items = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        inputs = {name: x.to(model.device) for name, x in pack_sequences(items).items()}
        count += num_labels(items)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            losses.append(model(**inputs, **FOR_LOSS, num_items_in_batch=1).loss)
    return math.fsum(torch.stack(losses).tolist()) / count


def slug(name: str) -> str:
    """Name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
