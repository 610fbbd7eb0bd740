"""Notice of changes to the weights of a model."""

from itertools import chain

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_optimizer_steps = 0  # of all optimizers: a fused one does not count its changes as PyTorch's versions do


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class Weights:
    """Parameters and buffers of a model."""

    def __init__(self, model: nn.Module):
        self._tensors = [x for x in chain(model.parameters(), model.buffers()) if not x.is_inference()]

    @property
    def version(self) -> int:
        """A number that grows with every change in place, by an optimizer or `load_state_dict`."""
        return sum(x._version for x in self._tensors) + _optimizer_steps
