"""Train LoRA adapters on conversations, merge them and talk to the model. No download, no GPU: minutes on 2 CPU cores.

As commands, with the conversations in chat.jsonl:

    lightning-attention train --data texts/ --output base
    lightning-attention train --init-from base --data chat.jsonl --output adapters --lora-rank 16 --learning-rate 5e-3
    lightning-attention merge --checkpoint adapters --output merged
    lightning-attention chat --checkpoint merged
"""

import shutil
from pathlib import Path

from finetune_chat import answers, train_base, write_conversations
from rich.console import Console
from transformers.utils import logging

from lightning_attention.models.adapters import merge_checkpoint
from lightning_attention.training import TrainingOptions, train


def main(output: Path = Path("lora"), base_steps: int = 300, steps: int = 1200) -> list[str]:
    logging.disable_progress_bar()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    console = Console(soft_wrap=True)
    base = train_base(output, base_steps, console)

    console.rule("training adapters on conversations")
    options = TrainingOptions(
        output / "adapters",
        data=(write_conversations(output / "chat.jsonl"),),
        init_from=base,
        lora_rank=16,
        sequence_length=256,
        batch_size=4,
        steps=steps,
        learning_rate=5e-3,
    )
    adapters = train(options, console=console)
    merge_checkpoint(adapters, output / "merged")  # a plain checkpoint, which needs neither PEFT nor the base model
    return answers(output / "merged", console)


if __name__ == "__main__":
    main()
