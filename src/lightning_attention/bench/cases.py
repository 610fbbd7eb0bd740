"""What is measured: shapes, and the arithmetic and traffic they take at least."""

from dataclasses import dataclass

import torch

from ..ops.chunked import CHUNK_SIZE


@dataclass(frozen=True)
class OpCase:
    """One call of the operator, forward and backward."""

    batch_size: int
    length: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.length

    @property
    def tensor_bytes(self) -> int:
        """Of q, which k, v and the output equal."""
        return self.num_tokens * self.num_heads * self.head_dim * self.dtype.itemsize

    def linear_flops(self, chunk_size: int = CHUNK_SIZE) -> int:
        """Of the chunkwise algorithm: forward `4 C D + 4 D²` a token and head, backward `10 C D + 10 D²`."""
        return 14 * self.num_tokens * self.num_heads * self.head_dim * (chunk_size + self.head_dim)

    def softmax_flops(self) -> int:
        """Of causal softmax attention: two products forward and five backward, over half of all pairs."""
        return 7 * self.num_tokens * self.num_heads * self.head_dim * self.length

    def minimal_bytes(self) -> int:
        """Forward reads q, k, v and writes o; backward reads q, k, v, do and writes dq, dk, dv."""
        return 11 * self.tensor_bytes
