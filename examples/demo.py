"""`make demo`: train a byte-level model on Python's standard library, then show what it can do. No download, no GPU."""

import math
import shutil
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import logging

from lightning_attention.inference import SamplingOptions, load, stream
from lightning_attention.models import LightningCache, LightningForCausalLM
from lightning_attention.training import Corpus, TrainingOptions, train
from lightning_attention.training.metrics import read_metrics

OUTPUT = Path("demo")
OPTIONS = TrainingOptions(
    output=OUTPUT,
    size="demo",
    sequence_length=64,  # many short texts teach more than as many bytes in longer ones
    batch_size=8,
    steps=2000,
    learning_rate=3e-3,
    min_lr=0.0,
    eval_every=2000,
    save_every=1000,
    log_every=100,
    eval_tokens=1 << 17,
)
LENGTHS = (1 << 10, 1 << 12, 1 << 14, 1 << 16)
BYTES = 256
PROMPTS = ("class ", '"""Return the ')
# The distribution of the model itself. Lower temperatures prefer the likeliest byte, and a quarter of the training text
# are blanks: after an indentation that is one more, again and again.
TEMPERATURE = 1.0


def main() -> None:
    started = time.monotonic()
    logging.disable_progress_bar()
    console = Console(soft_wrap=True)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    console.rule("training on Python's standard library")
    checkpoint = train(OPTIONS, console=console)
    model, tokenizer = load(checkpoint)

    corpus = Corpus.open(OUTPUT / "corpus")
    held_out = corpus.held_out_set(OPTIONS.sequence_length, OPTIONS.eval_tokens)
    measured = next(x for x in reversed(read_metrics(OUTPUT / "metrics.jsonl")) if "eval_loss" in x)
    loss = measured["eval_loss"]
    console.rule("the held-out loss")
    console.print(
        f"The mean of -ln p(next byte) over {len(held_out) * held_out.sequence_length:,} bytes that training has not "
        f"read. The model is as uncertain as a choice among {math.exp(loss):.1f} equally likely bytes; a uniform guess "
        f"chooses among {BYTES}."
    )
    table = Table("predicted by", "nats per byte", "bits per byte", box=None)
    for name, nats in (
        ("a uniform guess", math.log(BYTES)),
        ("byte frequencies of the training text", held_out.loss_of(corpus.unigram())),
        ("the model", loss),
    ):
        table.add_row(name, f"{nats:.3f}", f"{nats / math.log(2):.3f}")
    console.print(table)

    console.rule("speed and state size against the context length")
    text = torch.from_numpy(corpus.held_out_tokens()[: LENGTHS[-1]].astype("int64"))[None].to(model.device)
    table = Table("tokens", "forward pass, tokens/s", "state, bytes", box=None)
    for length in LENGTHS:
        speed, cache = forward_speed(model, text[:, :length])
        table.add_row(f"{length:,}", f"{speed:,.0f}", f"{cache.nbytes():,}")
    console.print(table)

    for seed, prompt in enumerate(PROMPTS):  # with equal seeds texts of different prompts resemble each other
        console.rule(f"a text that begins with {prompt.strip()}")
        options = SamplingOptions(max_new_tokens=300, temperature=TEMPERATURE, seed=seed)
        console.print(prompt + "".join(stream(model, tokenizer, prompt, options)), markup=False, highlight=False)
    console.rule()
    console.print(
        f"checkpoint  {checkpoint}\nmodel card  {checkpoint / 'README.md'}\nloss plot   {OUTPUT / 'loss.png'}"
    )
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
