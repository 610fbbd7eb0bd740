"""The state that decoding continues from: that of complete chunks, and the tokens of the chunk that is not complete."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import custom_ops
from .backends import BACKENDS, choose_backend
from .problem import DTYPES, Problem, check_backend, check_tensors, state_dtype


class DecodingState(NamedTuple):
    """State of sequences at their last chunk boundary, and a ring of the keys and values since.

    Decoding from it writes the state once in a chunk, not once a token, and has the bits of a forward pass: a new token
    reads the state and the ring in the order in which `lightning_attention(..., invariant=True)` reads them. With n
    tokens in the ring, the state after all tokens is

        λ^n S + Σ_j λ^(n-1-j) k_j v_jᵀ    (j from 0 to n - 1)

    `lightning_attention_step`, `_verify`, `_commit` and `_prefill_` take it as `state`, and update it in place. Its
    tensors may be views of a larger memory, contiguous in each slot.

    Attributes:
        state: `[N, H, K, V]` float32 (float64 for float64 inputs); or bfloat16, for storage alone: it is rounded when a
            chunk is complete, and no longer has the bits of a forward pass.
        keys: `[N, H, C, K]` in the dtype of the inputs; C is the size of a chunk.
        values: `[N, H, C, V]`, likewise.
        count: `[N, H]` int32, tokens in the ring, less than C; the same for all heads of a sequence.

    Example:
        >>> import torch
        >>> from lightning_attention import DecodingState, lightning_attention, lightning_attention_step
        >>> q, k, v = torch.randn(3, 1, 40, 2, 16)
        >>> state = DecodingState.zeros(1, 2, 16, 16)
        >>> steps = [lightning_attention_step(q[:, t], k[:, t], v[:, t], state=state) for t in range(40)]
        >>> torch.equal(torch.stack(steps, dim=1), lightning_attention(q, k, v, invariant=True).output)
        True
    """

    state: Tensor
    keys: Tensor
    values: Tensor
    count: Tensor

    @classmethod
    def zeros(
        cls,
        num_states: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        storage_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> "DecodingState":
        """Make the states of N sequences before their first tokens.

        Args:
            num_states: N, sequences or slots.
            num_heads: H.
            key_dim: K.
            value_dim: V.
            dtype: of queries, keys and values.
            device: of all tensors, by default PyTorch's.
            storage_dtype: of the state, if not that of the arithmetic.
            backend: that will use it; the size of a chunk depends on it.

        Raises:
            TypeError, ValueError, NotImplementedError: no backend can use such states.
        """
        device = torch.empty(0, device=device).device
        size = chunk_size(num_heads, key_dim, value_dim, dtype, device, backend)
        return cls(
            torch.zeros(
                num_states, num_heads, key_dim, value_dim, dtype=storage_dtype or state_dtype(dtype), device=device
            ),
            torch.zeros(num_states, num_heads, size, key_dim, dtype=dtype, device=device),
            torch.zeros(num_states, num_heads, size, value_dim, dtype=dtype, device=device),
            torch.zeros(num_states, num_heads, dtype=torch.int32, device=device),
        )

    @property
    def chunk_size(self) -> int:
        """C, tokens of a chunk."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return sum(part.nbytes for part in self)

    def select(self, indices: Tensor) -> "DecodingState":
        """Copy the states of some sequences, in the order of `indices` `[M]`."""
        return DecodingState(*(part[indices.to(part.device)] for part in self))

    def zero_(self) -> "DecodingState":
        """Set all sequences to the state before the first token."""
        for part in self:
            part.zero_()
        return self

    def fold_(self, log_decay: Tensor | None = None, indices: Tensor | None = None, backend: str = "auto") -> Tensor:
        """Add the rings to the states, which are plain states then, and empty the rings.

        Args:
            log_decay: `[H]` float32, as for `lightning_attention`.
            indices: `[M]` int32 or int64, the sequences, each once; -1 is none. By default all.
            backend: as for `lightning_attention`.

        Returns:
            `state`, `[N, H, K, V]`.
        """
        self.check()
        check_tensors({}, {"log_decay": log_decay, "indices": indices})
        custom_ops.fold(log_decay, *self, indices, backend)
        return self.state

    def check(self) -> None:
        """Raise a TypeError if a part is no dense tensor. Operators check the rest."""
        check_tensors(self._asdict(), {})


def chunk_size(
    num_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> int:
    """Tokens of a chunk in the decoding states for heads of these sizes."""
    check_backend(backend)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    problem = Problem(1, 1, num_heads, key_dim, value_dim, 1, dtype, device)
    return BACKENDS[choose_backend(backend, problem, invariant=True)].chunk_size(problem)
