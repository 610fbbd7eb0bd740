"""Exchange of states between ranks.

Each rank sends one state and receives the decayed sum of the states of earlier ranks; backward, of later ranks. A
strategy starts the transfer and returns a function that waits for the result. Only states are sent: with W ranks and
states of S = B·H·K·V·4 bytes (8 in float64), per layer and direction, for any sequence length:

    all-gather    (W - 1) S from every rank, in one collective
    ring          S from every rank to its neighbour, if a sequence crosses to it; W - 1 steps, pipelined over blocks

Source: all-gather, LASP-2 (arXiv 2502.07563); ring, LASP (arXiv 2404.02882) and ZeCO (arXiv 2507.01004).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .slices import Route, Slice
from .states import copy_integers, power, powers

# The last of W ranks waits for (b + W - 2) / b transfers of a state in b blocks: 1.75 with 8 ranks and 8 blocks, not 7.
RING_BLOCKS = 8

Wait = Callable[[], Tensor]


def all_gather(state: Tensor, route: Route, log_decay: Tensor, group: "dist.ProcessGroup | None") -> Wait:
    """Send every state to every rank; each computes `Σ_j λ^(distance to j) M_j` over its sources."""
    state = state.contiguous()
    distances = copy_integers(route.distances, like=log_decay)
    gathered = state.new_empty(dist.get_world_size(group), *state.shape)
    # A list of views, since gathering into one tensor is deprecated since torch 2.13.
    work: Any = dist.all_gather(list(gathered), state, group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        decay = powers(log_decay, distances)[:, None, :, None, None]
        return (gathered[route.sources.start : route.sources.stop] * decay).sum(0)

    return wait


def ring(state: Tensor, route: Route, log_decay: Tensor, group: "dist.ProcessGroup | None") -> Wait:
    """Send from neighbour to neighbour in blocks: the incoming state, decayed by the tokens here, plus `state`.

    The sum of a state that passes through this rank is computed on a CUDA stream of its own, or on a CPU in `wait`.
    """
    if state.is_cuda:
        _connect(dist.group.WORLD if group is None else group, state.device)
    sent = state.clone(memory_format=torch.contiguous_format)
    received = torch.zeros_like(sent)
    sent_blocks, received_blocks = _blocks(sent), _blocks(received)
    sends: list[Any] = _operations(dist.isend, sent_blocks, group, route.target)
    receives = _operations(dist.irecv, received_blocks, group, route.source)
    # A block is sent while the next one is received. So every rank that a state passes through sends a block one batch
    # after receiving it, which puts the batches of all ranks into one order: none waits for a later one.
    if route.passed_tokens is not None:
        sends.insert(0, None)
    batches = [[operation for operation in pair if operation] for pair in zip_longest(receives, sends)]
    works: Iterable[list[Any]] = map(dist.batch_isend_irecv, batches)
    if route.passed_tokens is None:
        works = list(works)

    def finish() -> None:
        passed = route.passed_tokens
        decay = None if passed is None else _blocks(power(log_decay, passed).expand(*state.shape[:-1], 1))
        for i, batch in enumerate(works):
            for work in batch:
                work.wait()
            if decay is not None and i < len(decay):
                sent_blocks[i].addcmul_(received_blocks[i], decay[i])

    stream = torch.cuda.Stream(state.device) if state.is_cuda and route.passed_tokens is not None else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(state.device))
        with torch.cuda.stream(stream):
            finish()

    def wait() -> Tensor:
        if stream is None:
            finish()
        else:
            torch.cuda.current_stream(state.device).wait_stream(stream)
        return received

    return wait


STRATEGIES = {"all-gather": all_gather, "ring": ring}


class Exchange:
    """Exchange of one attention call, forward and backward.

    Autograd runs backward in the reverse order of creation. If the local attention runs between `start` and `finish`,
    both directions overlap it: forward, `start` sends and `finish` waits; backward, `finish` sends and `start` waits.
    """

    def __init__(self, strategy: str, local: Slice, log_decay: Tensor, group: "dist.ProcessGroup | None"):
        self.strategy, self.local, self.log_decay, self.group = STRATEGIES[strategy], local, log_decay, group
        self.pending: list[Wait] = []

    def start(self, state: Tensor) -> Tensor:
        """Send this rank's outgoing state; returns the argument of `finish`."""
        return _Start.apply(state, self)

    def finish(self, started: Tensor) -> Tensor:
        """Wait for the incoming state of this rank; zero if there is none."""
        return _Finish.apply(started, self)

    def launch(self, state: Tensor, route: Route) -> None:
        """Start a transfer, unless states have no elements."""
        wait = self.strategy(state, route, self.log_decay, self.group) if state.numel() else lambda: state
        self.pending.append(wait)

    def wait(self) -> Tensor:
        """Wait for the transfer, and free its buffers."""
        return self.pending.pop()()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, state: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.launch(state, exchange.local.state_route)
        return state.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return ctx.exchange.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, started: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_state):
        ctx.exchange.launch(d_state, ctx.exchange.local.gradient_route)
        return d_state.new_empty(0), None


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Views of `[B, H, K, D]`, cut along all dimensions but the last; read-only if x is not contiguous."""
    return x.reshape(-1, x.shape[-1]).chunk(RING_BLOCKS)


def _operations(
    operation: Callable, blocks: Sequence[Tensor], group: "dist.ProcessGroup | None", peer: int | None
) -> list["dist.P2POp"]:
    if peer is None:
        return []
    return [dist.P2POp(operation, block, group=group, group_peer=peer) for block in blocks]


@cache
def _connect(group: "dist.ProcessGroup", device: torch.device) -> None:
    """Initialise NCCL by a collective: a first batch would wait for every rank, and some may have nothing to send."""
    dist.all_reduce(torch.zeros(1, device=device), group=group)
