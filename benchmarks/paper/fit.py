"""Training on batches that are made as they are needed, or of a model that has weights already."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from lightning_attention.models import LightningForCausalLM
from lightning_attention.training.segments import FOR_LOSS

WARMUP = 0.1  # of the steps


def fit(
    model: LightningForCausalLM,
    batches: Iterator[dict[str, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    dtype: str,
) -> None:
    """Train a model for a number of steps, by AdamW with a warm-up and a cosine to zero.

    Args:
        model: the model, in place.
        batches: inputs of the model with labels, at least as many as steps.
        steps: number of steps.
        learning_rate: highest learning rate.
        dtype: "bfloat16", by autocast, or "float32".
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    for _ in range(steps):
        inputs = {name: x.to(model.device) for name, x in next(batches).items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**inputs, **FOR_LOSS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
