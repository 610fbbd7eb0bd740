"""A Trainer that stops before a step which would spoil the model, and after a step when it is asked to."""

import time
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from .signals import StopRequest


class GuardedTrainer(Trainer):
    """transformers' Trainer, which steps only along finite gradients of a finite loss, and saves only finite weights.

    All processes decide alike, from one number a step that they read together.

    Args:
        stop: what signals ask for.

    Raises:
        FloatingPointError: from `train`, before the step that would have spoiled the model.
    """

    def __init__(self, *args: Any, stop: StopRequest, **options: Any):
        super().__init__(*args, **options)
        self.stop = stop
        self.args.logging_nan_inf_filter = False  # it would log zeros, and waits for every batch
        self._step_loss: Tensor | float = 0.0
        self._step_began = time.monotonic()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if not torch.is_grad_enabled():
            return loss
        loss = cast(Tensor, loss)
        self._step_loss = self._step_loss + loss.detach()
        # A factor of 1; or NaN, by which a loss that is not finite has gradients that are not, on all processes.
        return loss * (1 + 0 * loss.detach())

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm: Any = super()._clip_grad_norm(model)
        total = norm.full_tensor() if isinstance(norm, DTensor) else norm
        signal = torch.tensor(float(self.stop.signal), device=total.device)
        if dist.is_initialized():
            dist.all_reduce(signal, dist.ReduceOp.MAX)
        is_finite, signal = torch.stack([torch.isfinite(total).to(signal), signal]).tolist()
        loss, self._step_loss = self._step_loss, 0.0
        if not is_finite:
            raise FloatingPointError(
                f"step {self.state.global_step + 1} was not made: its loss is {float(loss):g} and the norm of its "
                f"gradient {float(total):g}"
            )
        if signal:
            self.stop.answered = int(signal)
            self.control.should_log = self.control.should_save = self.control.should_training_stop = True
        now = time.monotonic()
        self.stop.step_seconds, self._step_began = now - self._step_began, now
        return norm

    def check_weights(self) -> None:
        """
        Raises:
            FloatingPointError: on all processes, a weight is not finite.
        """
        weights = [
            cast(Any, x).to_local() if isinstance(x, DTensor) else x for x in cast(nn.Module, self.model).parameters()
        ]
        are_finite = torch.stack([x.detach().isfinite().all() for x in weights]).all().float()
        if dist.is_initialized():
            dist.all_reduce(are_finite, dist.ReduceOp.MIN)
        if not are_finite.item():
            raise FloatingPointError(
                f"the weights after step {self.state.global_step} are not finite and were not saved"
            )
