"""One more token for a batch of sequences."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cuda_graph import record
from ..models import LightningForCausalLM
from ..nn import Slots
from ..ops.backends import BACKENDS, choose_backend
from ..ops.problem import Problem
from .pool import StatePool


class Decoder:
    """Decoding steps of a model over the slots of a pool.

    Where the backend supports it a step is a CUDA graph, recorded at the first step of its size: the sizes are the
    powers of two and `max_rows`, and what is left over is padding, which touches no state.

    Args:
        model: in eval mode, on the device of the pool.
        pool: holds the states.
        max_rows: rows of a step, at most.
    """

    def __init__(self, model: LightningForCausalLM, pool: StatePool, max_rows: int):
        self.model, self.pool, self.max_rows = model, pool, max_rows
        self._graphs: dict[int, _Graph] = {}
        self._records = model.device.type == "cuda" and all(map(self._supports_cuda_graphs, pool.states))

    def __call__(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Logits `[B, vocab_size]`, which the next step may overwrite; the states advance.

        Args:
            tokens: B of them, each the next of its sequence.
            positions: where each of them stands in its sequence.
            slots: where each one's state is.
        """
        rows = torch.tensor([tokens, positions, slots], device="cpu")
        if not self._records:
            return self.step(rows.to(self.model.device))
        size = min(self.max_rows, 1 << (len(tokens) - 1).bit_length())
        if size not in self._graphs:
            memory = next(iter(self._graphs.values())).memory if self._graphs else None
            self._graphs[size] = _Graph(self, size, memory)
        return self._graphs[size](rows)

    @torch.no_grad()
    def step(self, rows: Tensor) -> Tensor:
        """The same without a graph, from tokens, positions and slots `[3, B]` int64 on the device."""
        tokens, positions, slots = rows
        x = self.model.model.advance(tokens[:, None], positions[:, None], self.pool.states, Slots(slots))
        return self.model.lm_head(x)

    def _supports_cuda_graphs(self, states: Tensor) -> bool:
        num_slots, H, K, V = states.shape
        problem = Problem(self.max_rows, 1, H, K, V, num_slots, self.model.dtype, self.model.device)
        return BACKENDS[choose_backend("auto", problem)].supports_cuda_graphs


class _Graph:
    """A step of one size."""

    def __init__(self, decoder: Decoder, size: int, memory: Any):
        self.rows = torch.tensor([[0], [0], [-1]], device=decoder.model.device).repeat(1, size)
        self.graph, self.logits = record(lambda: decoder.step(self.rows), memory)
        self.memory = self.graph.pool()

    def __call__(self, rows: Tensor) -> Tensor:
        used = rows.shape[1]
        self.rows[:, :used] = rows.pin_memory().to(self.rows.device, non_blocking=True)
        self.rows[2, used:] = -1
        self.graph.replay()
        return self.logits[:used]
