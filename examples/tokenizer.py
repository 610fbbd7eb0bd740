"""Make a byte-level BPE from text, train a model with it, and compare it with bytes. No download, no GPU: minutes.

As commands:

    lightning-attention tokenizer train --data texts/ --vocab-size 2048 --output bpe
    lightning-attention train --data texts/ --tokenizer bpe --output run
    lightning-attention compare run run-of-bytes --output losses.png
"""

import shutil
from pathlib import Path

from rich.console import Console
from transformers.utils import logging

from lightning_attention.inference import SamplingOptions, load, stream
from lightning_attention.training import TrainingOptions, train
from lightning_attention.training.bpe import save_tokenizer, train_bpe
from lightning_attention.training.comparison import read_runs, table_of_runs
from lightning_attention.training.documents import Sources, standard_library
from lightning_attention.training.plots import plot_runs

TEXT = standard_library() / "asyncio"


def main(output: Path = Path("bpe"), vocab_size: int = 2048, steps: int = 300) -> str:
    logging.disable_progress_bar()
    shutil.rmtree(output, ignore_errors=True)
    console = Console(soft_wrap=True)
    tokenizer = train_bpe(Sources.find(TEXT), vocab_size)
    folder = save_tokenizer(tokenizer, output / "tokenizer")
    console.print("tokens:", " | ".join(tokenizer.tokenize("async def run(self):")), markup=False, highlight=False)

    checkpoints = {}
    for name, made in (("bytes", "bytes"), ("bpe", str(folder))):
        console.rule(f"training with {name}")
        options = TrainingOptions(
            output / name,
            data=(TEXT,),
            tokenizer=made,
            sequence_length=128,
            steps=steps,
            learning_rate=3e-3,
            log_every=50,
        )
        checkpoints[name] = train(options, console=console)

    console.rule("losses: bits per byte compare, nats per token do not")
    runs = read_runs([output / name for name in checkpoints])
    plot_runs(runs, output / "losses.png")
    console.print(table_of_runs(runs))
    sampling = SamplingOptions(max_new_tokens=60, temperature=0.7, seed=0)
    sample = "".join(stream(*load(checkpoints["bpe"]), "async def ", sampling))
    console.print(f"async def {sample}", markup=False, highlight=False)
    return sample


if __name__ == "__main__":
    main()
