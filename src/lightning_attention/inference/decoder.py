"""Decoding steps for a batch of sequences."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cuda_graph import record
from ..models import LightningForCausalLM
from ..nn import Slots
from ..ops.backends import BACKENDS, choose_backend
from ..ops.decoding_state import DecodingState
from ..ops.problem import Problem
from .packing import PackedWeights
from .pool import StatePool


class Decoder:
    """Decoding steps of a model over the slots of a pool.

    If the backend supports it a step is a CUDA graph, captured at the first step of its batch size. Batch sizes are
    rounded up to powers of two and `max_batch_size`; padding has slot -1, which leaves all states unchanged.

    Args:
        model: in eval mode, on the device of the pool.
        pool: holds the states.
        max_batch_size: sequences of a step, at most.
        pack_weights: decode with packed copies of the weights, see `PackedWeights`.
    """

    def __init__(
        self, model: LightningForCausalLM, pool: StatePool, max_batch_size: int, *, pack_weights: bool = False
    ):
        self.model, self.pool, self.max_batch_size = model, pool, max_batch_size
        self._packed = PackedWeights(model) if pack_weights else None
        self._graphs: dict[int, _Graph] = {}
        self._uses_graphs = model.device.type == "cuda" and all(map(self._supports_cuda_graphs, pool.states))

    def __call__(
        self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], weights_version: int = 0
    ) -> Tensor:
        """Advance B sequences by a token; return logits `[B, vocab_size]`, which the next step may overwrite.

        Args:
            tokens: next token of each sequence.
            positions: position of each token in its sequence.
            slots: slot of each state.
            weights_version: changes with the weights.
        """
        inputs = torch.tensor([tokens, positions, slots], device="cpu")
        if self._packed is not None:
            with self._packed.in_use(weights_version):
                return self.step(inputs)
        if not self._uses_graphs:
            return self.step(inputs.to(self.model.device))
        size = min(self.max_batch_size, 1 << (len(tokens) - 1).bit_length())
        if size not in self._graphs:
            memory = next(iter(self._graphs.values())).memory if self._graphs else None
            self._graphs[size] = _Graph(self, size, memory)
        return self._graphs[size](inputs)

    @torch.no_grad()
    def step(self, inputs: Tensor) -> Tensor:
        """Advance without a graph, from tokens, positions and slots `[3, B]`, int64 on the device."""
        tokens, positions, slots = inputs
        x = self.model.model.advance(tokens[:, None], positions[:, None], self.pool.states, Slots(slots))
        return self.model.compute_logits(x)

    def _supports_cuda_graphs(self, states: Tensor | DecodingState) -> bool:
        if isinstance(states, DecodingState):
            return True  # only backends with kernels have them on a GPU
        num_slots, H, K, V = states.shape
        problem = Problem(self.max_batch_size, 1, H, K, V, num_slots, self.model.dtype, self.model.device)
        return BACKENDS[choose_backend("auto", problem)].supports_cuda_graphs


class _Graph:
    """CUDA graph of a step of one batch size."""

    def __init__(self, decoder: Decoder, size: int, memory: Any):
        self.inputs = torch.tensor([[0], [0], [-1]], device=decoder.model.device).repeat(1, size)
        self.graph, self.logits = record(lambda: decoder.step(self.inputs), memory)
        self.memory = self.graph.pool()

    def __call__(self, inputs: Tensor) -> Tensor:
        used = inputs.shape[1]
        self.inputs[:, :used] = inputs.pin_memory().to(self.inputs.device, non_blocking=True)
        self.inputs[2, used:] = -1
        self.graph.replay()
        return self.logits[:used]
