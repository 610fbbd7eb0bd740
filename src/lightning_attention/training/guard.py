"""Trainer that stops before a step with non-finite gradients, and after a step when a signal asks."""

import time
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from .signals import StopRequest


class GuardedTrainer(Trainer):
    """Trainer that makes a step only if loss and gradients are finite, and saves only finite weights.

    All processes take the same decision: they share the norm of the gradients and the signal at every step.

    Args:
        stop: request to stop, set by signals.

    Raises:
        FloatingPointError: by `train`, before a step with a non-finite loss or gradient.
    """

    def __init__(self, *args: Any, stop: StopRequest, **options: Any):
        super().__init__(*args, **options)
        self.stop = stop
        self.args.logging_nan_inf_filter = False  # it logs zeros in place of NaN, and waits for every batch
        self._step_loss: Tensor | float = 0.0
        self._step_began = time.monotonic()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if not torch.is_grad_enabled():
            return loss
        loss = cast(Tensor, loss)
        self._step_loss = self._step_loss + loss.detach()
        # The factor is 1, or NaN for a non-finite loss, which makes the shared gradients non-finite on all processes.
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
        """Check that the weights of all processes are finite.

        Raises:
            FloatingPointError: on all processes, if a weight is not finite.
        """
        parameters = cast(nn.Module, self.model).parameters()
        weights = [cast(Any, x).to_local() if isinstance(x, DTensor) else x for x in parameters]
        are_finite = torch.stack([x.detach().isfinite().all() for x in weights]).all().float()
        if dist.is_initialized():
            dist.all_reduce(are_finite, dist.ReduceOp.MIN)
        if not are_finite.item():
            raise FloatingPointError(
                f"the weights after step {self.state.global_step} are not finite and were not saved"
            )
