"""Calls of attention with a fault on one rank, by name, and the errors of all ranks."""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from lightning_attention import distributed, lightning_attention

LENGTHS = (3, 2, 0, 4)
CU_SEQLENS = torch.tensor([0, 4, 9])
LOG_DECAY = torch.tensor([-0.5, -1.0])


def all_arguments() -> dict[str, Any]:
    """Arguments of one process with all tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, sum(LENGTHS), 2, 4, generator=generator) for _ in range(3))
    initial_state = torch.randn(2, 2, 4, 4, generator=generator)
    states = {"initial_state": initial_state, "output_final_state": True, "cu_seqlens": CU_SEQLENS}
    return {"q": q, "k": k, "v": v, "log_decay": LOG_DECAY, "scale": 0.5} | states


def arguments_of(rank: int, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    arguments, start = all_arguments(), sum(lengths[:rank])
    return arguments | {name: arguments[name][:, start : start + lengths[rank]] for name in "qkv"}


class Interrupted(list):
    """List that raises KeyboardInterrupt when it is read."""

    error: type[BaseException] = KeyboardInterrupt

    def __iter__(self):
        raise self.error


class OutOfMemory(Interrupted):
    error = MemoryError


def sized(B: int = 1, N: int = 2, H: int = 2, K: int = 4, V: int = 4, dtype: torch.dtype = torch.float32) -> dict:
    """Two tokens with sizes that differ from those of other ranks."""
    q, k, v = (torch.randn(B, 2, H, D, dtype=dtype) for D in (K, K, V))
    state = torch.zeros(N, H, K, V, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return {"q": q, "k": k, "v": v, "initial_state": state, "log_decay": -torch.ones(H)}


TWO = torch.zeros(1, 2, 2, 4)

# Faults of one rank alone: the change of its arguments, and its error.
RAISED: dict[str, tuple[dict[str, Any], str]] = {
    "q-no-tensor": ({"q": "x"}, "TypeError: q must be a dense tensor, got str"),
    "v-None": ({"v": None}, "TypeError: v must be a dense tensor, got NoneType"),
    "q-sparse": ({"q": TWO.to_sparse()}, "TypeError: q must be a dense tensor, got torch.sparse_coo"),
    "q-three-dimensions": ({"q": TWO[0]}, "ValueError: q must be [B, T, H, K], got shape (2, 2, 4)"),
    "k-other-K": ({"k": torch.zeros(1, 2, 2, 5)}, "ValueError: k must have the shape of q (1, 2, 2, 4)"),
    "v-other-tokens": ({"v": torch.zeros(1, 3, 2, 4)}, "ValueError: v must be [1, 2, 2, 'V'] to fit q"),
    "q-integers": ({"q": TWO.long()}, "TypeError: q must be one of torch.float64"),
    "k-other-dtype": ({"k": TWO.double()}, "TypeError: k must have the dtype of q"),
    "meta": (
        {name: TWO.to("meta") for name in "qkv"}
        | {"initial_state": torch.zeros(2, 2, 4, 4, device="meta"), "log_decay": LOG_DECAY.to("meta")},
        "ValueError: q must be on a device that the backend of the group serves",
    ),
    "log_decay-above-0": ({"log_decay": -LOG_DECAY}, "ValueError: log_decay must be <= 0, got a maximum of 1.0"),
    "log_decay-nan": ({"log_decay": LOG_DECAY * float("nan")}, "ValueError: log_decay must be <= 0, got a maximum of"),
    "log_decay-float64": ({"log_decay": LOG_DECAY.double()}, "TypeError: log_decay must be torch.float32"),
    "log_decay-other-H": ({"log_decay": LOG_DECAY[:1]}, "ValueError: log_decay must be [H] = [2]"),
    "log_decay-gradient": (
        {"log_decay": LOG_DECAY.clone().requires_grad_()},
        "ValueError: log_decay must not require a gradient",
    ),
    "initial_state-other-V": ({"initial_state": torch.zeros(2, 2, 4, 5)}, "ValueError: initial_state must be [N, H,"),
    "initial_state-dtype": ({"initial_state": torch.zeros(2, 2, 4, 4).half()}, "TypeError: initial_state must be"),
    "cu_seqlens-float": ({"cu_seqlens": CU_SEQLENS.float()}, "TypeError: cu_seqlens must be int32 or int64"),
    "cu_seqlens-two-dimensions": ({"cu_seqlens": CU_SEQLENS[None]}, "ValueError: cu_seqlens must be [N + 1], got"),
    "cu_seqlens-of-a-batch": (sized(B=2), "ValueError: cu_seqlens packs all sequences into one batch row: B must be 1"),
    "strategy-unknown": ({"strategy": "tree"}, "ValueError: strategy must be one of 'all-gather', 'ring', got 'tree'"),
    "strategy-list": ({"strategy": ["ring"]}, "TypeError: strategy must be a string, got list"),
    "backend-unknown": ({"backend": "fast"}, "ValueError: backend must be 'auto' or one of"),
    "backend-None": ({"backend": None}, "TypeError: backend must be a string, got NoneType"),
    "backend-incapable": ({"backend": "hopper"}, "NotImplementedError: backend 'hopper' cannot run this: "),
    "scale-nan": ({"scale": float("nan")}, "ValueError: scale must be finite, got nan"),
    "scale-text": ({"scale": "1"}, "TypeError: scale must be a number, got str"),
    "output_final_state-1": ({"output_final_state": 1}, "TypeError: output_final_state must be True or False, got int"),
    "check-text": ({"check": "yes"}, "TypeError: check must be True or False, got str"),
    "lengths-own-wrong": ({"lengths": [3, 3, 0, 3]}, "ValueError: lengths must be the numbers of tokens of 4 ranks, 2"),
    "lengths-of-three": ({"lengths": [3, 2, 4]}, "ValueError: lengths must be the numbers of tokens of 4 ranks, 2"),
    "lengths-none": ({"lengths": []}, "ValueError: lengths must be the numbers of tokens of 4 ranks, 2 of rank 1, got"),
    "lengths-negative": ({"lengths": [-1, 2, 4, 4]}, "ValueError: lengths must be the numbers of tokens of 4 ranks, 2"),
    "lengths-number": ({"lengths": 9}, "TypeError: lengths must be the numbers of tokens of 4 ranks, 2 of rank 1, got"),
    "lengths-floats": ({"lengths": [3.0, 2.0, 0.0, 4.0]}, "TypeError: lengths must be integers, the numbers of tokens"),
    "grad-transform": ({}, "NotImplementedError: distributed.lightning_attention does not run under the transforms"),
    "vmap-transform": ({}, "NotImplementedError: distributed.lightning_attention does not run under the transforms"),
    "tangent": ({}, "NotImplementedError: distributed.lightning_attention has no forward-mode derivative"),
    "interrupted": ({"lengths": Interrupted(LENGTHS)}, "KeyboardInterrupt"),
    "out-of-memory": ({"lengths": OutOfMemory(LENGTHS)}, "MemoryError"),
}

# Differences between ranks: the change of the arguments of one rank, and the error of every rank.
DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "B": (sized(B=2) | {"cu_seqlens": None}, "B must be the same on every rank of the group, got [1, 2, 1, 1]"),
    "H": (sized(H=3), "H must be the same on every rank of the group, got [2, 3, 2, 2]"),
    "K": (sized(K=5), "K must be the same on every rank of the group, got [4, 5, 4, 4]"),
    "V": (sized(V=5), "V must be the same on every rank of the group, got [4, 5, 4, 4]"),
    "V-without-values": (sized(V=0), "V must be the same on every rank of the group, got [4, 0, 4, 4]"),
    "bfloat16": (sized(dtype=torch.bfloat16), "dtype must be the same on every rank of the group, got ['torch.float32"),
    "float64": (sized(dtype=torch.float64), "dtype must be the same on every rank of the group, got ['torch.float32'"),
    "N": (
        sized(N=3) | {"cu_seqlens": torch.tensor([0, 4, 5, 9])},
        "N must be the same on every rank of the group, got [2, 3, 2, 2]",
    ),
    "cu_seqlens-missing": (
        sized(N=1) | {"cu_seqlens": None},
        "cu_seqlens given must be the same on every rank of the group, got [True, False, True, True]",
    ),
    "cu_seqlens-values": (
        {"cu_seqlens": torch.tensor([0, 5, 9])},
        "cu_seqlens must be the same on every rank of the group, got [[0, 4, 9], [0, 5, 9], [0, 4, 9], [0, 4, 9]]",
    ),
    "cu_seqlens-too-short": ({"cu_seqlens": torch.tensor([0, 4, 8])}, "cu_seqlens must be the same on every rank"),
    "cu_seqlens-falling": ({"cu_seqlens": torch.tensor([0, 10, 9])}, "cu_seqlens must be the same on every rank"),
    "initial_state-missing": (
        {"initial_state": None},
        "initial_state given must be the same on every rank of the group, got [True, False, True, True]",
    ),
    "gradient": (
        {"k": TWO.clone().requires_grad_()},
        "a gradient for k, v or initial_state must be the same on every rank of the group, got [False, True, False,",
    ),
    "scale": ({"scale": 0.25}, "scale must be the same on every rank of the group, got [0.5, 0.25, 0.5, 0.5]"),
    "output_final_state": ({"output_final_state": False}, "output_final_state must be the same on every rank of"),
    "log_decay-missing": ({"log_decay": None}, "log_decay must be the same on every rank of the group, got [[-0.5, -1"),
    "log_decay-values": (
        {"log_decay": LOG_DECAY.nextafter(torch.zeros(2))},
        "log_decay must be the same on every rank of the group, got [[-0.5, -1.0], [-0.4999999",
    ),
    "lengths-elsewhere": ({"lengths": [3, 2, 1, 3]}, "lengths must be the same on every rank of the group, got ["),
}


def attend_under(name: str, group: Any, arguments: dict[str, Any]) -> Any:
    """Call attention, under the transform of that name if there is one."""

    def call(**given: Any) -> Any:
        return distributed.lightning_attention(**given, group=group)

    if name == "grad-transform":
        return torch.func.grad(lambda q: call(**arguments | {"q": q}).output.sum())(arguments["q"])
    if name == "vmap-transform":
        return torch.func.vmap(lambda q: call(**arguments | {"q": q}).output)(arguments["q"][None])
    if name == "tangent":
        with (
            forward_ad.dual_level(),
            warnings.catch_warnings(action="ignore"),  # from torch.jit, for the first dual tensor
        ):
            q = forward_ad.make_dual(arguments["q"], torch.ones_like(arguments["q"]))
            return call(**arguments | {"q": q})
    return call(**arguments)


def error_of(call: Callable[[], Any]) -> tuple[str, float]:
    """Text of the error that a call raises, and the seconds that it takes."""
    start = time.monotonic()
    try:
        call()
        text = "none"
    except (Exception, KeyboardInterrupt) as error:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return text, time.monotonic() - start


def outcome(
    group: Any, fault: str | dict[str, Any], faulty: Sequence[int], options: dict[str, Any]
) -> tuple[str, float, Tensor, Tensor]:
    """Error of a call that some ranks make with a fault, by name or as a change of arguments, and its seconds.

    Then the output and final state of the right call.
    """
    rank, arguments = dist.get_rank(group), arguments_of(dist.get_rank(group)) | options
    name, changes = (fault, (RAISED | DIFFERENT)[fault][0]) if isinstance(fault, str) else ("", fault)
    wrong = arguments | changes if rank in faulty else arguments
    text, seconds = error_of(lambda: attend_under(name if rank in faulty else "", group, wrong))
    output, final_state = distributed.lightning_attention(**arguments, group=group)
    assert final_state is not None
    return text, seconds, output, final_state


def outcome_with_two_errors(group: Any) -> tuple[str, float, Tensor, Tensor]:
    rank = dist.get_rank(group)
    changes = {1: {"strategy": "tree"}, 3: {"q": None}}.get(rank, {})
    return outcome(group, changes, (1, 3), {})


def error_outside_the_group(_: Any) -> str:
    group: Any = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        return "none"
    return error_of(lambda: distributed.lightning_attention(**arguments_of(dist.get_rank()), group=group))[0]


def error_in_a_group_of_two(group: Any, changes: dict[str, Any]) -> str:
    """Error of a call in a group of two ranks, the second with a fault."""
    rank = dist.get_rank(group)
    arguments = arguments_of(rank, (7, 2)) | (changes if rank == 1 else {})
    return error_of(lambda: distributed.lightning_attention(**arguments, group=group))[0]


def error_of_bad_group(_: Any, group: Any) -> str:
    return error_of(lambda: distributed.lightning_attention(**arguments_of(dist.get_rank()), group=group))[0]


def collectives(group: Any, options: dict[str, Any]) -> int:
    """Number of gathers in a call with the ring, which itself does not gather."""
    count, gather = 0, dist.ProcessGroup.allgather

    def counted(*arguments):
        nonlocal count
        count += 1
        return gather(*arguments)

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    lengths = LENGTHS if size == len(LENGTHS) else (9,)
    with patch.object(dist.ProcessGroup, "allgather", counted):
        distributed.lightning_attention(**arguments_of(rank, lengths), group=group, strategy="ring", **options)
    return count


def results_by_check(group: Any, check: bool, strategy: str) -> tuple[Tensor, ...]:
    """Outputs and gradients."""
    arguments: dict[str, Any] = arguments_of(dist.get_rank(group)) | {
        "check": check,
        "lengths": LENGTHS,
        "strategy": strategy,
    }
    leaves = [arguments[name].requires_grad_() for name in ("q", "k", "v", "initial_state")]
    output, final_state = distributed.lightning_attention(**arguments, group=group)
    assert final_state is not None
    return output, final_state, *torch.autograd.grad(output.square().sum() + final_state.square().sum(), leaves)


def error_of_one_rank(group: Any) -> tuple[str, float]:
    """Error of a call without checks that only rank 1 makes."""
    arguments = arguments_of(dist.get_rank(group)) | {"check": False, "strategy": "tree", "lengths": LENGTHS}
    if dist.get_rank(group) == 1:
        return error_of(lambda: distributed.lightning_attention(**arguments, group=group))
    return "none", 0.0


def expected() -> tuple[Tensor, Tensor]:
    output, final_state = lightning_attention(**all_arguments())
    assert final_state is not None
    return output, final_state
