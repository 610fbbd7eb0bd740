"""Learning rates of a run: schedules of transformers, by the options."""

from typing import Any, cast

import torch
from transformers import get_scheduler

from .options import TrainingOptions

# Names in transformers of `options.SCHEDULES`.
NAMES = {"cosine": "cosine_with_min_lr", "wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}
LOWEST = 0.1  # of the highest learning rate, by default


def schedule_arguments(options: TrainingOptions) -> dict[str, Any]:
    """Arguments of `TrainingArguments` for the schedule of a run."""
    given, special = options.min_lr, {}
    if options.schedule == "cosine":
        special = {"min_lr_rate": LOWEST} if given is None else {"min_lr": given}
    elif options.schedule == "wsd":
        lowest = LOWEST if given is None else given / options.learning_rate
        special = {"num_decay_steps": options.num_decay_steps, "decay_type": "1-sqrt", "min_lr_ratio": lowest}
    return {
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": NAMES[options.schedule],
        "lr_scheduler_kwargs": special,
        "warmup_steps": options.num_warmup_steps,
    }


def learning_rate(options: TrainingOptions, step: int) -> float:
    """Compute the learning rate of the step after `step` steps.

    Example:
        >>> from lightning_attention.training import TrainingOptions
        >>> from lightning_attention.training.schedule import learning_rate
        >>> options = TrainingOptions("run", steps=100, schedule="wsd", learning_rate=1e-3)
        >>> learning_rate(options, 50), learning_rate(options, 100)
        (0.001, 0.0001)
    """
    arguments = schedule_arguments(options)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=options.learning_rate)
    scheduler: Any = get_scheduler(
        arguments["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=arguments["warmup_steps"],
        num_training_steps=options.steps,
        scheduler_specific_kwargs=arguments["lr_scheduler_kwargs"],
    )
    return options.learning_rate * cast(float, scheduler.lr_lambdas[0](step))


def set_learning_rates(optimizer: Any, scheduler: Any, highest: list[float]) -> None:
    """Give an optimizer the rates of a scheduler at its step, with other highest rates.

    A checkpoint holds the rates of the options it was trained with; a resumed run may have others.

    Args:
        optimizer: restored from a checkpoint.
        scheduler: of the optimizer, a `LambdaLR` restored from a checkpoint.
        highest: highest rate of each parameter group.
    """
    scheduler.base_lrs = highest
    for group, rate, factor in zip(optimizer.param_groups, highest, scheduler.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
