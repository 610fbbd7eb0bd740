"""The public call: check, see what this rank holds, and put the pieces together."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..ops import library
from ..ops.api import LightningAttentionOutput, autocast
from ..ops.api import lightning_attention as attend
from ..ops.chunked import rates_of
from ..ops.problem import (
    DTYPES,
    Problem,
    check_backend,
    check_log_decay,
    check_output_final_state,
    check_tensors,
    checked_scale,
    sequence_bounds,
)
from ..ops.transforms import refuse_transforms
from .exchange import STRATEGIES, Exchange
from .slices import Slice, slice_of
from .states import add_incoming_, on_device_of, outgoing_state, power


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    group: "dist.ProcessGroup | None" = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    strategy: str = "all-gather",
    backend: str = "auto",
) -> LightningAttentionOutput:
    """`lightning_attention` over tokens that are spread over the ranks of a process group, in the order of the ranks.

    Rank r holds the next n_r tokens of every sequence; slices may differ in length, or be empty. With `M_r` the state
    that a slice leaves from a zero start, `S_r` that which comes to it, and i counting its tokens from 0:

        S_{r+1} = λ^{n_r} S_r + M_r        o_i = (that of the slice alone) + scale λ^{i+1} S_rᵀ q_i

    Outputs and gradients are those of one process. Only the states `[B, H, K, V]` travel, and their gradients, while
    the slice alone is worked on. Every rank must make the call, and if gradients are needed its backward pass.

    Args:
        q: queries of this rank's tokens `[B, n_r, H, K]`; otherwise as for one process, like all that follow.
        k: keys, the shape and dtype of q.
        v: values `[B, n_r, H, V]`, the dtype of q.
        log_decay: `[H]`, the same on every rank.
        group: a `torch.distributed` process group; None is the default group. Of any backend that moves tensors of this
            device: gloo does not send those of a GPU, as the ring has to.
        scale: factor on every output.
        initial_state: `[N, H, K, V]`, given by every rank or none. Used by the rank on which a sequence begins; its
            gradient is there, and zero elsewhere.
        output_final_state: also return the states after the last tokens.
        cu_seqlens: `[N + 1]`, bounds of the sequences in the row of all ranks' tokens, the same on every rank, B = 1. A
            sequence may lie on any number of ranks. Read by the host, so best on a CPU, whatever the device of q.
        lengths: the n_r of all ranks, given by every rank or none. None has them exchanged, and sizes and options
            compared, in a small collective that the host waits for.
        strategy: how states travel, "all-gather" or "ring": see `exchange`, also for the bytes.
        backend: as for one process.

    Returns:
        `output` `[B, n_r, H, V]`. `final_state` `[N, H, K, V]` or None: a sequence's state on the rank where it ends,
        zero elsewhere. Without `cu_seqlens` sequences begin on the first rank and end on the last; with it, on the
        ranks of their first and last tokens, and empty ones lie on the first rank whose slice reaches them.

    Raises:
        ValueError, TypeError, NotImplementedError: as for one process; ValueError also for an unknown strategy, a
            process that is not in the group, lengths that do not fit, and, without lengths, what differs between ranks.

    Source: LASP-2 (arXiv 2502.07563), here with a decay; ZeCO (arXiv 2507.01004).
    """
    check_tensors(
        {"q": q, "k": k, "v": v},
        {"log_decay": log_decay, "initial_state": initial_state, "cu_seqlens": cu_seqlens},
    )
    refuse_transforms("distributed.lightning_attention", q=q, k=k, v=v, initial_state=initial_state)
    scale = checked_scale(scale)
    check_output_final_state(output_final_state)
    check_backend(backend)
    rank = _rank_in(group)
    q, k, v = autocast(q, k, v)
    # Its values are read here, wherever it is; only shape and dtype remain to be checked.
    seqlens = None if cu_seqlens is None else torch.empty_like(cu_seqlens, device=q.device)
    problem = Problem.of_attention(q, k, v, log_decay, initial_state, seqlens)
    check_log_decay(log_decay)
    backend = library.choose_backend(backend, problem)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
    if lengths is None:
        states = (k, v, initial_state) if torch.is_grad_enabled() else ()
        has_gradient = any(x is not None and x.requires_grad for x in states)
        lengths = _exchange_lengths(problem, cu_seqlens, initial_state, has_gradient, strategy, group)
    else:
        _check_lengths(lengths, q.shape[1], rank, dist.get_world_size(group))
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, sum(lengths))
    held = slice_of(rank, lengths, bounds)
    num_documents = 1 if bounds is None else problem.num_states
    rates = rates_of(q, log_decay)
    exchange = Exchange(strategy, held, rates, group)

    initial = None if initial_state is None else _states_here(initial_state, held, num_documents)
    outgoing, k, v = outgoing_state(k, v, initial, rates, held, backend)
    started = exchange.start(outgoing)
    o, final = attend(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=None if initial is None else initial.flatten(0, 1),
        output_final_state=output_final_state,
        cu_seqlens=None if bounds is None else on_device_of(q, held.cu_seqlens),
        backend=backend,
    )
    incoming = exchange.finish(started)
    o = add_incoming_(o, q, incoming, rates, held.head, scale, backend)
    if final is not None:
        final = _states_of_all(final, incoming * power(rates, held.head), held, num_documents)
    return LightningAttentionOutput(o, final)


def _states_here(initial_state: Tensor, held: Slice, num_documents: int) -> Tensor:
    """The states of the documents here `[D, B, H, K, V]`; zero for one that began elsewhere."""
    states = initial_state.unflatten(0, (num_documents, -1 if num_documents else 1))
    begun = held.documents.start + held.continues
    return _padded(states[begun : held.documents.stop], int(held.continues), 0)


def _states_of_all(states: Tensor, incoming: Tensor, held: Slice, num_documents: int) -> Tensor:
    """`[N, H, K, V]`: those of the documents that end here, the first with what came to it, and zeros."""
    documents = held.documents
    states = states.unflatten(0, (len(documents), incoming.shape[0])) + _padded(incoming[None], 0, len(documents) - 1)
    ended = len(documents) - held.goes_on
    return _padded(states[:ended], documents.start, num_documents - documents.start - ended).flatten(0, 1)


def _padded(states: Tensor, before: int, after: int) -> Tensor:
    """Zeros before and after the first dimension of five; cut where negative."""
    return F.pad(states, (*(0,) * 8, before, after))


def _rank_in(group: "dist.ProcessGroup | None") -> int:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group must be initialised: call torch.distributed.init_process_group first")
    if (rank := dist.get_rank(group)) < 0:
        raise ValueError(f"group must contain this process, got one without rank {dist.get_rank()}")
    return rank


def _check_lengths(lengths: Sequence[int], length: int, rank: int, world_size: int) -> None:
    if len(lengths) != world_size or min(lengths) < 0 or lengths[rank] != length:
        expected = f"the numbers of tokens of {world_size} ranks, {length} of rank {rank}"
        raise ValueError(f"lengths must be {expected}, got {list(lengths)}")


def _exchange_lengths(
    problem: Problem,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    has_gradient: bool,
    strategy: str,
    group: "dist.ProcessGroup | None",
) -> list[int]:
    """The tokens of every rank. On the rest they have to agree: others would wait forever for one that does not."""
    common = {
        "B": problem.batch_size,
        "H": problem.num_heads,
        "K": problem.key_dim,
        "V": problem.value_dim,
        "dtype": DTYPES.index(problem.dtype),
        "N": problem.num_states,
        "cu_seqlens given": cu_seqlens is not None,
        "initial_state given": initial_state is not None,
        "a gradient for k, v or initial_state": has_gradient,
        "strategy": list(STRATEGIES).index(strategy),
    }
    mine = torch.tensor([problem.length, *common.values()], dtype=torch.int64, device=problem.device)
    gathered = mine.new_empty(dist.get_world_size(group), len(mine))
    dist.all_gather(list(gathered), mine, group=group)
    lengths, *columns = gathered.T.tolist()
    meaning = {"dtype": [str(dtype) for dtype in DTYPES], "strategy": list(STRATEGIES)}
    for name, values in zip(common, columns, strict=True):
        if len(set(values)) > 1:
            values = [meaning[name][value] for value in values] if name in meaning else values
            raise ValueError(f"{name} must be the same on every rank of the group, got {values}")
    return lengths
