"""The public call: check, see what this rank holds, and put the pieces together."""

from collections.abc import Sequence
from numbers import Integral

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..ops.api import LightningAttentionOutput, autocast
from ..ops.api import lightning_attention as attend
from ..ops.backends import choose_backend
from ..ops.chunked import finite_log_decay
from ..ops.problem import (
    Problem,
    check_backend,
    check_log_decay,
    check_output_final_state,
    check_tensors,
    checked_scale,
    sequence_bounds,
)
from ..ops.transforms import refuse_transforms
from .agreement import Agreement, device_types, is_member
from .exchange import STRATEGIES, Exchange
from .slices import Slice, slice_of
from .states import add_incoming_, on_device_of, outgoing_state, power


@torch.compiler.disable(reason="distributed.lightning_attention is not traced: ranks must make the same collectives")
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
    check: bool = True,
) -> LightningAttentionOutput:
    """`lightning_attention` over tokens that are spread over the ranks of a process group, in the order of the ranks.

    Rank r holds the next n_r tokens of every sequence; slices may differ in length, or be empty. With `M_r` the state
    that a slice leaves from a zero start, `S_r` that which comes to it, and i counting its tokens from 0:

        S_{r+1} = λ^{n_r} S_r + M_r        o_i = (that of the slice alone) + scale λ^{i+1} S_rᵀ q_i

    Outputs and gradients are those of one process. Only the states `[B, H, K, V]` travel, and their gradients, while
    the slice alone is worked on. Every rank must make the call, and if gradients are needed its backward pass.

    The ranks compare their calls before a state travels: an error on one rank, or a difference, raises on every rank.

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
        lengths: the n_r of all ranks, given by every rank or none; None has the check exchange them.
        strategy: how states travel, "all-gather" or "ring": see `exchange`, also for the bytes.
        backend: as for one process.
        check: compare the calls of all ranks, in one small collective that the host waits for. False, on every rank,
            compares nothing and needs `lengths`: an error on one rank then leaves the others waiting.

    Returns:
        `output` `[B, n_r, H, V]`. `final_state` `[N, H, K, V]` or None: a sequence's state on the rank where it ends,
        zero elsewhere. Without `cu_seqlens` sequences begin on the first rank and end on the last; with it, on the
        ranks of their first and last tokens, and empty ones lie on the first rank whose slice reaches them.

    Raises:
        ValueError, TypeError, NotImplementedError: as for one process, and on every rank what one of them raised;
            ValueError also for an unknown strategy, a process that is not in the group, lengths that do not fit, and
            what differs between ranks.
        RuntimeError: another rank raised an error of any other type.

    Example:
        o = distributed.lightning_attention(q, k, v, log_decay).output  # within torchrun

    Source: LASP-2 (arXiv 2502.07563), here with a decay; ZeCO (arXiv 2507.01004).
    """
    with Agreement(group, q, enabled=check is not False) as agreement:
        if not isinstance(check, bool):
            raise TypeError(f"check must be True or False, got {type(check).__name__}")
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
        # The host reads its values, wherever it is; only shape and dtype have to be checked.
        seqlens = None if cu_seqlens is None else torch.empty_like(cu_seqlens, device=q.device)
        problem = Problem.of_attention(q, k, v, log_decay, initial_state, seqlens)
        if q.device.type not in (types := device_types(group)):
            raise ValueError(f"q must be on a device that the backend of the group serves, {types}, got {q.device}")
        backend = choose_backend(backend, problem)
        if not isinstance(strategy, str):
            raise TypeError(f"strategy must be a string, got {type(strategy).__name__}")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
        if lengths is not None:
            lengths = _checked_lengths(lengths, problem.length, rank, dist.get_world_size(group))
        elif not check:
            raise ValueError("lengths must be given with check=False: no rank is asked for its length")
        check_log_decay(log_decay.cpu() if check and log_decay is not None else log_decay)
        if check:
            cu_seqlens = None if cu_seqlens is None else cu_seqlens.cpu()
            options = {"strategy": strategy, "scale": scale, "output_final_state": output_final_state}
            terms = _terms(problem, k, v, log_decay, initial_state, cu_seqlens) | options | {"lengths": lengths}
            lengths = agreement.settle(problem.length, terms)
    assert lengths is not None
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, sum(lengths))
    held = slice_of(rank, lengths, bounds)
    num_documents = 1 if bounds is None else problem.num_states
    rates = finite_log_decay(q, log_decay)
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


def _terms(
    problem: Problem,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> dict[str, object]:
    """Sizes and values that have to be equal on every rank."""
    differentiable = (k, v, initial_state) if torch.is_grad_enabled() else ()
    return {
        "B": problem.batch_size,
        "H": problem.num_heads,
        "K": problem.key_dim,
        "V": problem.value_dim,
        "dtype": str(problem.dtype),
        "device": problem.device.type,
        "cu_seqlens given": cu_seqlens is not None,
        "initial_state given": initial_state is not None,
        "N": problem.num_states,
        "a gradient for k, v or initial_state": any(x is not None and x.requires_grad for x in differentiable),
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.tolist(),
        "log_decay": None if log_decay is None else [x + 0.0 for x in log_decay.tolist()],  # -0.0 is 0.0
    }


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
    if not is_member(group):
        if not isinstance(group, (dist.ProcessGroup, type(dist.GroupMember.NON_GROUP_MEMBER))):
            raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
        raise ValueError(f"group must contain this process, got one without rank {dist.get_rank()}")
    return dist.get_rank(group)


def _checked_lengths(lengths: object, length: int, rank: int, world_size: int) -> list[int]:
    expected = f"the numbers of tokens of {world_size} ranks, {length} of rank {rank}"
    if not isinstance(lengths, Sequence) or isinstance(lengths, (str, bytes)):
        raise TypeError(f"lengths must be {expected}, got {type(lengths).__name__}")
    if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in lengths):
        raise TypeError(f"lengths must be integers, {expected}, got {list(lengths)}")
    lengths = [int(n) for n in lengths]
    if len(lengths) != world_size or min(lengths) < 0 or lengths[rank] != length:
        raise ValueError(f"lengths must be {expected}, got {lengths}")
    return lengths
