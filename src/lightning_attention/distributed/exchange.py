"""How states travel. Each rank gives one, and gets those of the ranks before it, decayed; backward, of those after it.

A strategy launches that, and returns what waits for it. Both send states and nothing else: with W ranks and states of
S = B·H·K·V·4 bytes (8 in float64), per layer and direction, whatever the length:

    all-gather    (W - 1) S from every rank, in one collective
    ring          S from every rank to its neighbour, if a document crosses to it; W - 1 steps, pipelined over blocks

LASP-2 (arXiv 2502.07563) is the first; LASP (arXiv 2404.02882) and ZeCO (arXiv 2507.01004) are the second.
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
from .states import on_device_of, power, powers

# The last of W ranks waits for (b + W - 2) / b transfers of a state in b blocks: 1.75 with 8 ranks and 8 blocks, not 7.
RING_BLOCKS = 8

Wait = Callable[[], Tensor]


def all_gather(state: Tensor, route: Route, rates: Tensor, group: "dist.ProcessGroup | None") -> Wait:
    """Every state to every rank: `Σ_j λ^(distance to j) M_j` over the sources."""
    state = state.contiguous()
    distances = on_device_of(rates, route.distances)
    gathered = state.new_empty(dist.get_world_size(group), *state.shape)
    # The call into one tensor is deprecated since torch 2.13.
    work: Any = dist.all_gather(list(gathered), state, group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        decay = powers(rates, distances)[:, None, :, None, None]
        return (gathered[route.sources.start : route.sources.stop] * decay).sum(0)

    return wait


def ring(state: Tensor, route: Route, rates: Tensor, group: "dist.ProcessGroup | None") -> Wait:
    """From neighbour to neighbour, block by block: what comes, decayed by the tokens here, plus `state` goes on.

    On an accelerator a stream of its own does that, on a CPU the wait, where a state passes through this rank.
    """
    if state.is_cuda:
        _connect(dist.group.WORLD if group is None else group, state.device)
    sent = state.clone(memory_format=torch.contiguous_format)
    received = torch.zeros_like(sent)
    sent_blocks, received_blocks = _blocks(sent), _blocks(received)
    sends: list[Any] = _operations(dist.isend, sent_blocks, group, route.target)
    receives = _operations(dist.irecv, received_blocks, group, route.source)
    # A block goes on while the next one comes. So it is sent one batch later than it is received, on every rank that it
    # passes through, and the batches of all ranks can be put in one order: none waits for a later one.
    if route.passing is not None:
        sends.insert(0, None)
    batches = [[operation for operation in pair if operation] for pair in zip_longest(receives, sends)]
    works: Iterable[list[Any]] = map(dist.batch_isend_irecv, batches)
    if route.passing is None:
        works = list(works)

    def finish() -> None:
        decay = None if route.passing is None else _blocks(power(rates, route.passing).expand(*state.shape[:-1], 1))
        for i, batch in enumerate(works):
            for work in batch:
                work.wait()
            if decay is not None and i < len(decay):
                sent_blocks[i].addcmul_(received_blocks[i], decay[i])

    stream = torch.cuda.Stream(state.device) if state.is_cuda and route.passing is not None else None
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
    """The exchange of one call, there and back.

    Autograd runs what was made last first. With the local work made between `start` and `finish`, both directions
    overlap it: forward, start sends and finish waits; backward, finish sends and start waits.
    """

    def __init__(self, strategy: str, held: Slice, rates: Tensor, group: "dist.ProcessGroup | None"):
        self.strategy, self.held, self.rates, self.group = STRATEGIES[strategy], held, rates, group
        self.pending: list[Wait] = []

    def start(self, state: Tensor) -> Tensor:
        """Send the state that this rank leaves; returns what `finish` takes."""
        return _Start.apply(state, self)

    def finish(self, started: Tensor) -> Tensor:
        """The state that comes to this rank, zero where none does."""
        return _Finish.apply(started, self)

    def launch(self, state: Tensor, route: Route) -> None:
        """Nothing is sent of states without elements."""
        wait = self.strategy(state, route, self.rates, self.group) if state.numel() else lambda: state
        self.pending.append(wait)

    def wait(self) -> Tensor:
        """Once for a launch: what it holds is then free."""
        return self.pending.pop()()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, state: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.launch(state, exchange.held.from_left)
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
        ctx.exchange.launch(d_state, ctx.exchange.held.from_right)
        return d_state.new_empty(0), None


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    """`[B, H, K, D]` cut along its rows into views; of a tensor that has to be copied, only to be read."""
    return x.reshape(-1, x.shape[-1]).chunk(RING_BLOCKS)


def _operations(
    operation: Callable, blocks: Sequence[Tensor], group: "dist.ProcessGroup | None", peer: int | None
) -> list["dist.P2POp"]:
    if peer is None:
        return []
    return [dist.P2POp(operation, block, group=group, group_peer=peer) for block in blocks]


@cache
def _connect(group: "dist.ProcessGroup", device: torch.device) -> None:
    """If a batch is the first call of a group, NCCL waits for one of every rank; some may have nothing to send."""
    dist.all_reduce(torch.zeros(1, device=device), group=group)
