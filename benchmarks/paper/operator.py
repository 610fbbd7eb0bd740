"""Time and memory of the operator against the length: Figure 3 of 2401.04658, Figure 4 of 2405.17381."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import op
from ..cases import OpCase
from ..implementations import IMPLEMENTATIONS, Attention, Implementation
from ..report import OURS
from ..run import Benchmark

KIND = "paper-operator"


def _left_product(log_decay: Tensor, _: Tensor | None) -> Attention:
    """`((Q Kᵀ) ⊙ M) V`, with `M[t, s] = exp((t - s) log_decay)` for s ≤ t, of `[B, H, T, D]`: the papers' "Vanilla"."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = torch.arange(q.shape[2], device=q.device)
        distances = t[:, None] - t
        mask = (distances * log_decay[:, None, None]).exp().tril()
        return (q @ k.mT * mask.to(q.dtype)) @ v

    return attend


# The names of the papers: Lightning-2 is ours, FlashAttention-2 is PyTorch's.
PAPER = (OURS, "lightning-1", "SDPA flash", "scaled_dot_product_attention")
VANILLA = tuple(
    Implementation("PyTorch, left product", device, _left_product, is_quadratic=True, is_head_first=True)
    for device in ("cpu", "cuda")
)
COMPARED = tuple(x for x in IMPLEMENTATIONS if x.name in PAPER) + VANILLA


def benchmark(cases: Sequence[OpCase], device: torch.device, *, softmax_up_to: int, seconds: float) -> Benchmark:
    """Measure as `python -m benchmarks op` does."""
    return op.benchmark(
        KIND, list(cases), device, softmax_up_to=softmax_up_to, seconds=seconds, implementations=COMPARED
    )
