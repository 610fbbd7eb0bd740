"""Cases to measure: shapes, and the least arithmetic and memory traffic that they need."""

import random
from dataclasses import dataclass

import torch

# (B, T, H, D, packed sequences): long, short and few sequences, few and many heads.
TABLE = (
    (4, 32768, 32, 128, None),
    (4, 4096, 32, 128, None),
    (4, 32768, 32, 64, None),
    (8, 2048, 16, 64, None),
    (1, 8192, 64, 128, None),
    (1, 1024, 64, 128, None),
    (1, 32768, 64, 128, 20),
    (1, 131072, 16, 128, None),
    (2, 1048576, 8, 128, None),
    (1, 1048576, 1, 128, None),
)

# Likewise, where the promise of `invariant` may cost something: few heads, few tokens, packed sequences.
INVARIANT = {
    "cuda": (
        (4, 32768, 32, 128, None),
        (4, 4096, 32, 128, None),
        (8, 2048, 16, 64, None),
        (1, 8192, 64, 128, None),
        (1, 8192, 16, 128, None),
        (1, 1024, 64, 128, None),
        (1, 32768, 64, 128, 20),
        (1, 131072, 16, 128, None),
        (1, 131072, 8, 128, None),
    ),
    "cpu": ((1, 4096, 8, 64, None), (1, 256, 8, 64, None), (1, 4096, 8, 64, 20)),
}

# Chunk size for counting the arithmetic of the chunkwise algorithm; implementations use their own.
CHUNK_SIZE = 64


@dataclass(frozen=True)
class Pass:
    """Forward or backward.

    Args:
        name: "forward" or "backward".
        tensors: least number of tensors of q's size to read or write.
        results: number of tensors of q's size to write.
        products: number of matrix products over pairs of tokens.
    """

    name: str
    tensors: int
    results: int
    products: int


# Forward reads q, k, v and writes o; backward reads q, k, v, do and writes dq, dk, dv.
FORWARD = Pass("forward", tensors=4, results=1, products=2)
BACKWARD = Pass("backward", tensors=7, results=3, products=5)


@dataclass(frozen=True)
class OpCase:
    """Operator call with K = V = D; with `packed_sequences`, as many sequences of about one length are packed in T."""

    batch_size: int
    length: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    packed_sequences: int | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`[B, T, H, D]`."""
        return self.batch_size, self.length, self.num_heads, self.head_dim

    @property
    def boundaries(self) -> list[int] | None:
        """Boundaries of the packed sequences, `[N + 1]`, as in `cu_seqlens`."""
        if (n := self.packed_sequences) is None:
            return None
        return [self.length * i // n for i in range(n + 1)]

    @property
    def tensor_bytes(self) -> int:
        """Size of q, which k, v and the output share."""
        return self._num_elements * self.dtype.itemsize

    @property
    def needed_bytes(self) -> int:
        """Least memory: q, k, v, the output, their gradients, and the float32 states."""
        return 8 * self.tensor_bytes + 4 * self.batch_size * self.num_heads * self.head_dim**2

    def minimal_bytes(self, direction: Pass) -> int:
        """Least memory traffic; over the bandwidth of a copy, this is the least time (the floor)."""
        return direction.tensors * self.tensor_bytes

    def linear_flops(self, direction: Pass, chunk_size: int = CHUNK_SIZE) -> int:
        """Operations of the chunkwise algorithm: `4 C D + 4 D²` per token and head forward, 2.5 times that backward."""
        return 2 * direction.products * self._num_elements * (chunk_size + self.head_dim)

    def quadratic_flops(self, direction: Pass) -> int:
        """Operations of causal attention: two products forward and five backward, over half of all pairs of tokens."""
        return direction.products * self._num_elements * self.length

    @property
    def _num_elements(self) -> int:
        return self.batch_size * self.length * self.num_heads * self.head_dim


# Batch sizes of a decode step; with 64 heads of 128 a sequence's state takes 4 MiB. The largest comes first: an
# implementation that tunes itself at its first call keeps that choice.
STEP_BATCHES = {"cuda": (256, 64, 16, 1), "cpu": (16, 4, 1)}


@dataclass(frozen=True)
class StepCase:
    """Decode step of a batch: one token per sequence, K = V = D, float32 states."""

    batch_size: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def state_bytes(self) -> int:
        return self.batch_size * self.num_heads * self.head_dim**2 * torch.float32.itemsize

    @property
    def minimal_bytes(self) -> int:
        """Least memory traffic: the state read and written once, q, k and v read, o written."""
        return 2 * self.state_bytes + 4 * self.batch_size * self.num_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class ContextCase:
    """Decode step of a model: one token per sequence, at the end of a context of `length` tokens."""

    batch_size: int
    length: int


# Number of requests of a serving case, and how many of them are answered one by one.
REQUESTS = {"cuda": (256, 8), "cpu": (8, 2)}


@dataclass(frozen=True)
class ServingCase:
    """Requests of mixed sizes.

    Args:
        requests: number of requests.
        sample: number of requests that are answered one by one.
        max_requests: number of requests that the engine decodes at once.
        prompt_tokens: least and largest length of a prompt.
        answer_tokens: least and largest length of an answer.
    """

    requests: int
    sample: int
    max_requests: int = 64
    prompt_tokens: tuple[int, int] = (16, 1024)
    answer_tokens: tuple[int, int] = (16, 256)

    def sizes(self) -> list[tuple[int, int]]:
        """Lengths of prompt and answer of every request, the same at every call."""
        draw = random.Random(0).randint
        return [(draw(*self.prompt_tokens), draw(*self.answer_tokens)) for _ in range(self.requests)]


@dataclass(frozen=True)
class TrainingCase:
    """Training step on one sequence in training segments."""

    length: int
    segment_length: int

    @property
    def num_segments(self) -> int:
        return -(-self.length // self.segment_length)
