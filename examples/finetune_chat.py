"""Fine-tune a model on conversations and talk to it. No download, no GPU: minutes on 2 CPU cores.

The conversations are made here. For your own, write lines with `messages` to a .jsonl file. As commands:

    lightning-attention train --data texts/ --output base
    lightning-attention train --init-from base --data chat.jsonl --output tuned --learning-rate 1e-3
    lightning-attention chat --checkpoint tuned
"""

import json
import random
import shutil
from pathlib import Path

from rich.console import Console
from transformers.utils import logging

from lightning_attention.inference import Conversation, SamplingOptions, load
from lightning_attention.training import TrainingOptions, train
from lightning_attention.training.documents import standard_library

FACTS = {
    "print": "It writes text.",
    "len": "It counts the items.",
    "range": "It gives numbers in steps.",
    "sorted": "It puts items in order.",
    "open": "It opens a file.",
    "sum": "It adds up numbers.",
    "max": "It finds the largest item.",
    "input": "It reads a line.",
}
ASKED = ("What does {} do?", "Explain {}, please.", "And {}?")
QUESTIONS = ("What does sorted do?", "And input?", "Explain len, please.")


def main(output: Path = Path("chat"), base_steps: int = 300, steps: int = 400) -> list[str]:
    logging.disable_progress_bar()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    console = Console(soft_wrap=True)
    base = train_base(output, base_steps, console)

    console.rule("fine-tuning on conversations: the loss is that of the answers")
    data = write_conversations(output / "chat.jsonl")
    options = TrainingOptions(
        output / "tuned",
        data=(data,),
        init_from=base,
        sequence_length=256,
        batch_size=4,
        steps=steps,
        learning_rate=2e-3,
    )
    return answers(train(options, console=console), console)


def train_base(output: Path, steps: int, console: Console) -> Path:
    """Train a model on a package of Python's standard library; it may be any checkpoint."""
    console.rule("training on text")
    text = standard_library() / "asyncio"
    options = TrainingOptions(
        output / "base", data=(text,), sequence_length=128, steps=steps, learning_rate=3e-3, log_every=50
    )
    return train(options, console=console)


def write_conversations(file: Path, count: int = 2000) -> Path:
    rng = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            messages = []
            for name in rng.sample(list(FACTS), 3):
                messages.append({"role": "user", "content": rng.choice(ASKED).format(name)})
                messages.append({"role": "assistant", "content": FACTS[name]})
            lines.write(json.dumps({"messages": messages}) + "\n")
    return file


def answers(checkpoint: Path, console: Console) -> list[str]:
    console.rule("a conversation")
    conversation = Conversation(*load(checkpoint), SamplingOptions(max_new_tokens=40, temperature=0))
    found = []
    for question in QUESTIONS:
        found.append("".join(conversation.answer(question)))
        console.print(f"> {question}\n{found[-1]}", markup=False, highlight=False)
    console.print(f"more: lightning-attention chat --checkpoint {checkpoint} --temperature 0", highlight=False)
    return found


if __name__ == "__main__":
    main()
