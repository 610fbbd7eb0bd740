"""What is measured: shapes, and the arithmetic and traffic they take at least."""

import random
from dataclasses import dataclass

import torch

# (B, T, H, D, documents): long, short and few sequences, few and many heads, packed documents.
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

# Of the chunkwise algorithm, where its arithmetic is counted; what an implementation takes is its own affair.
CHUNK_SIZE = 64


@dataclass(frozen=True)
class Pass:
    """Forward or backward.

    Args:
        name: of the pass.
        tensors: of q's size that it reads or writes, at least.
        results: those among them that it makes.
        products: of matrices, over pairs of tokens.
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
    """One call of the operator, with keys and values of one size; `documents` of about one length packed into a row."""

    batch_size: int
    length: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    documents: int | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`[B, T, H, D]`."""
        return self.batch_size, self.length, self.num_heads, self.head_dim

    @property
    def bounds(self) -> list[int] | None:
        """Where documents begin, and where the last one ends."""
        if self.documents is None:
            return None
        return [self.length * i // self.documents for i in range(self.documents + 1)]

    @property
    def tensor_bytes(self) -> int:
        """Of q, which k, v and the output equal."""
        return self._num_elements * self.dtype.itemsize

    @property
    def needed_bytes(self) -> int:
        """Memory of q, k, v, the output, their gradients, and the float32 states, at least."""
        return 8 * self.tensor_bytes + 4 * self.batch_size * self.num_heads * self.head_dim**2

    def minimal_bytes(self, direction: Pass) -> int:
        """That any implementation has to move: the floor of its time is this over the copy bandwidth."""
        return direction.tensors * self.tensor_bytes

    def linear_flops(self, direction: Pass, chunk_size: int = CHUNK_SIZE) -> int:
        """Of the chunkwise algorithm: forward `4 C D + 4 D²` a token and head, backward `10 C D + 10 D²`."""
        return 2 * direction.products * self._num_elements * (chunk_size + self.head_dim)

    def quadratic_flops(self, direction: Pass) -> int:
        """Of causal attention over pairs: two products forward and five backward, over half of all pairs."""
        return direction.products * self._num_elements * self.length

    @property
    def _num_elements(self) -> int:
        return self.batch_size * self.length * self.num_heads * self.head_dim


# Sequences that are given a token; with 64 heads of 128 the state of each takes 4 MiB. The most first: an
# implementation that tunes itself at its first call keeps what it found for all.
STEP_BATCHES = {"cuda": (256, 64, 16, 1), "cpu": (16, 4, 1)}


@dataclass(frozen=True)
class StepCase:
    """One token for a batch, with keys and values of one size and a float32 state."""

    batch_size: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def state_bytes(self) -> int:
        return self.batch_size * self.num_heads * self.head_dim**2 * torch.float32.itemsize

    @property
    def minimal_bytes(self) -> int:
        """That any implementation has to move: the state read and written once, q, k and v read and o written."""
        return 2 * self.state_bytes + 4 * self.batch_size * self.num_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class ContextCase:
    """A token for every sequence of a batch, the last of a context of `length` tokens."""

    batch_size: int
    length: int


# Of a serving case: how many, and how many of them one by one.
REQUESTS = {"cuda": (256, 8), "cpu": (8, 2)}


@dataclass(frozen=True)
class ServingCase:
    """Requests of mixed sizes.

    Args:
        requests: how many.
        sample: of them that are answered one by one.
        max_requests: that an engine decodes at once.
        prompt_tokens: fewest and most.
        answer_tokens: likewise.
    """

    requests: int
    sample: int
    max_requests: int = 64
    prompt_tokens: tuple[int, int] = (16, 1024)
    answer_tokens: tuple[int, int] = (16, 256)

    def sizes(self) -> list[tuple[int, int]]:
        """Tokens of prompt and answer of every request, always the same."""
        draw = random.Random(0).randint
        return [(draw(*self.prompt_tokens), draw(*self.answer_tokens)) for _ in range(self.requests)]


@dataclass(frozen=True)
class TrainingCase:
    """A step on one sequence, read by segments."""

    length: int
    segment_length: int

    @property
    def num_segments(self) -> int:
        return -(-self.length // self.segment_length)
