"""`make demo`: train a byte-level model on Python's standard library, then show what it can do. No download, no GPU."""

import shutil
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import logging

from lightning_attention.inference import SamplingOptions, load, stream
from lightning_attention.models import LightningCache, LightningForCausalLM
from lightning_attention.training import Corpus, TrainingOptions, evaluate, train

OUTPUT = Path("demo")
OPTIONS = TrainingOptions(
    output=OUTPUT,
    size="demo",
    sequence_length=128,
    batch_size=8,
    steps=900,
    learning_rate=3e-3,
    eval_every=300,
    save_every=300,
    log_every=50,
    eval_tokens=1 << 15,
)
LENGTHS = (1 << 10, 1 << 12, 1 << 14, 1 << 16)
BYTES = 256


def main() -> None:
    started = time.monotonic()
    logging.disable_progress_bar()
    console = Console(soft_wrap=True)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    console.rule("training on Python's standard library")
    checkpoint = train(OPTIONS, console=console)
    model, tokenizer = load(checkpoint)

    corpus = Corpus.open(OUTPUT / "corpus")
    held_out = corpus.held_out_set(LENGTHS[0], max_tokens=1 << 17)
    result = evaluate(model, held_out, corpus.unigram(), BYTES)
    console.rule(f"held-out loss over {result.num_tokens:,} bytes")
    table = Table("predicted by", "nats per byte", box=None)
    table.add_row("a uniform distribution over bytes", f"{result.uniform:.3f}")
    table.add_row("byte frequencies of the training text", f"{result.unigram:.3f}")
    table.add_row("the model", f"{result.loss:.3f}")
    console.print(table)

    console.rule("speed and state size against the context length")
    text = torch.from_numpy(corpus.held_out_tokens()[: LENGTHS[-1]].astype("int64"))[None].to(model.device)
    table = Table("tokens", "forward pass, tokens/s", "state, bytes", box=None)
    for length in LENGTHS:
        speed, cache = forward_speed(model, text[:, :length])
        table.add_row(f"{length:,}", f"{speed:,.0f}", f"{cache.nbytes():,}")
    console.print(table)

    console.rule("a sample")
    prompt = "def "
    sample = "".join(stream(model, tokenizer, prompt, SamplingOptions(max_new_tokens=400, temperature=0.7, seed=0)))
    console.print(prompt + sample, markup=False, highlight=False)
    console.rule()
    console.print(f"checkpoint  {checkpoint}\nloss plot   {OUTPUT / 'loss.png'}")
    console.print(f"more text   .venv/bin/lightning-attention generate --checkpoint {OUTPUT} --prompt 'import '")
    console.print(f"took {time.monotonic() - started:.0f} s")


@torch.no_grad()
def forward_speed(model: LightningForCausalLM, tokens: torch.Tensor) -> tuple[float, LightningCache]:
    """Tokens per second of a forward pass, the best of three, and the cache that it returns."""
    runs = []
    for _ in range(3):
        start = time.perf_counter()
        cache = model(tokens, use_cache=True, logits_to_keep=1).cache
        runs.append((tokens.numel() / (time.perf_counter() - start), cache))
    return max(runs, key=lambda run: run[0])


if __name__ == "__main__":
    main()
