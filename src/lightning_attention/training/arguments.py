"""transformers' `TrainingArguments` for the options of a run."""

import os
from datetime import datetime
from typing import Any

import torch
from transformers import TrainingArguments

from .execution import Execution
from .options import TrainingOptions
from .schedule import schedule_arguments

# transformers renames gradient_checkpointing within version 5.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)


class OneDeviceArguments(TrainingArguments):
    """Arguments of a process that works on one device: torchrun starts a process for each, not DataParallel."""

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)


def training_arguments(options: TrainingOptions, execution: Execution) -> TrainingArguments:
    checkpointing: dict[str, Any] = {CHECKPOINTING: True} if options.gradient_checkpointing else {}
    return OneDeviceArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        weight_decay=options.weight_decay,
        optim="adamw_torch_fused",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=options.log_every,
        eval_strategy="steps" if options.evaluates else "no",
        eval_steps=options.eval_every,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=2,
        bf16=execution.bf16,
        use_cpu=not torch.accelerator.is_available(),  # or bf16 is refused
        seed=options.seed,
        data_seed=options.seed,
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",  # see `reporting`
        run_name=f"{options.output.resolve().name}-{datetime.now():%Y-%m-%d-%H-%M-%S}",  # trackers join equal names
        ddp_find_unused_parameters=False if "RANK" in os.environ else None,
        **checkpointing,
        **schedule_arguments(options),
    )
