"""Time that calls on small inputs keep the host: what the library costs beside its kernels."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_attention import decay, lightning_attention, lightning_attention_step

from .harness import Call
from .report import OURS, Record, rounded

ROUNDS, CALLS = 100, 64
# Batch size, length, heads and head size. Few heads and long sequences take several launches.
SHAPES = {"one launch": (1, 64, 4, 64), "several launches": (1, 16_384, 1, 64)}


def measure(device: torch.device) -> list[Record]:
    """Least microseconds of a call, by case: of operators on a GPU, and of a decoding step beside plain calls.

    Short rounds of calls of each take turns, and the least time of each counts: other processes can only add to it.
    """
    records = []
    if device.type == "cuda":
        is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
        for backend in ("triton", "hopper") if is_hopper else ("triton",):
            for launches, shape in SHAPES.items():
                calls = _sequences(backend, *shape, device)
                records.append({"backend": backend, "case": launches, "shape": shape, **_least(calls, device)})
    for batch_size, num_heads, head_dim in ((1, 8, 64), (4, 4, 64)):
        calls = steps(batch_size, num_heads, head_dim, device)
        records.append({"case": "decoding step", "shape": (batch_size, num_heads, head_dim), **_least(calls, device)})
    return records


def _sequences(backend: str, B: int, T: int, H: int, D: int, device: torch.device) -> dict[str, Call]:
    q, k, v, do = torch.randn(4, B, T, H, D, device=device, dtype=torch.bfloat16)
    log_decay = decay.log_decay(H, preset="alibi").to(device)
    leaves = q_leaf, k_leaf, v_leaf = tuple(x.clone().requires_grad_() for x in (q, k, v))

    def forward() -> Tensor:
        with torch.no_grad():
            return lightning_attention(q, k, v, log_decay, backend=backend).output

    def forward_with_gradient() -> Tensor:
        return lightning_attention(q_leaf, k_leaf, v_leaf, log_decay, backend=backend).output

    o = forward_with_gradient()
    return {
        "forward": forward,
        "forward with gradient": forward_with_gradient,
        "backward": lambda: torch.autograd.grad(o, leaves, do, retain_graph=True),
    }


def steps(B: int, H: int, D: int, device: torch.device) -> dict[str, Call]:
    """A step, and three plain calls that do the same."""
    q, k, v = torch.randn(3, B, H, D, device=device)
    state = torch.zeros(B, H, D, D, device=device)
    log_decay = decay.log_decay(H, preset="alibi").to(device)
    factor = log_decay.exp()[:, None, None]

    def einsum() -> Tensor:
        state.mul_(factor).addcmul_(k[..., :, None], v[..., None, :])
        return torch.einsum("bhk,bhkv->bhv", q, state)

    def matmul() -> Tensor:
        state.mul_(factor).addcmul_(k[..., :, None], v[..., None, :])
        return (q[:, :, None] @ state)[:, :, 0]

    return {
        OURS: lambda: lightning_attention_step(q, k, v, log_decay, state=state),
        "mul_, addcmul_, einsum": einsum,
        "mul_, addcmul_, matmul": matmul,
    }


def _least(calls: Mapping[str, Call], device: torch.device) -> dict[str, dict[str, float]]:
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            least[name] = min(least[name], (time.perf_counter() - start) / CALLS)
    return {"microseconds": {name: rounded(1e6 * seconds) for name, seconds in least.items()}}
