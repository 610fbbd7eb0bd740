"""Train on sequences of a million tokens on one GPU, by training segments, and see what far context gives.

python examples/long_sequence.py
python examples/long_sequence.py --sequence-length 8192 --segment-length 1024 --size demo --steps 20  # on a CPU
"""

from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from lightning_attention.inference import load
from lightning_attention.training import Corpus, TrainingOptions, train
from lightning_attention.training.documents import standard_library


def main(
    output: Path = Path("long"),
    sequence_length: int = 1 << 20,
    segment_length: int = 1 << 15,
    size: str = "45M",
    steps: int = 100,
) -> None:
    """Train on Python's standard library as one text of about 30 million bytes."""
    logging.disable_progress_bar()
    console = Console(soft_wrap=True)
    book = output.with_suffix(".txt")
    write_book(book)
    options = TrainingOptions(
        output,
        data=(book,),
        size=size,
        sequence_length=sequence_length,
        segment_length=segment_length,  # activations of one segment are in memory, and a state per boundary
        batch_size=1,
        steps=steps,
        log_every=max(1, steps // 10),
        eval_every=steps,
        save_every=steps,
        eval_tokens=sequence_length,
        held_out=max(0.05, 1.1 * sequence_length / book.stat().st_size),  # at least one sequence
    )
    model, _ = load(train(options, console=console))

    console.rule("held-out loss by the number of bytes before")
    tokens = torch.from_numpy(Corpus.open(output / "corpus").held_out_tokens()[:sequence_length].astype("int64"))[None]
    table, cache, losses = Table("position", "nats per byte", box=None), None, []
    with torch.no_grad():
        for segment in tokens.to(model.device).split(segment_length, dim=1):  # the state carries all that came before
            result = model(segment, labels=segment, cache=cache, use_cache=True)
            cache, losses = result.cache, [*losses, result.loss.item()]
    begin = 0
    while begin < len(losses):  # 1, 1, 2, 4, ... segments
        end = min(max(1, 2 * begin), len(losses))
        table.add_row(f"from {begin * segment_length:,}", f"{sum(losses[begin:end]) / (end - begin):.4f}")
        begin = end
    console.print(table)
    if torch.cuda.is_available():
        console.print(f"most GPU memory in use: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def write_book(file: Path) -> None:
    """Join the modules of the standard library, so that a document is as long as a sequence."""
    modules = sorted(standard_library().rglob("*.py"))
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in modules if "site-packages" not in path.parts)
    file.write_text("\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
