"""Lightning Attention over tokens that are spread over the ranks of a process group."""

from collections.abc import Sequence
from numbers import Integral

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..ops import autograd
from ..ops.api import LightningAttentionOutput
from ..ops.api import lightning_attention as attend
from ..ops.backends import choose_backend
from ..ops.custom_ops import autocast
from ..ops.inputs import AttentionInputs
from ..ops.problem import Problem, check_backend, check_bool, check_tensors, checked_scale
from ..ops.states import finite_log_decay
from ..ops.transforms import refuse_transforms
from ..ops.values import check_log_decay, sequence_bounds
from .agreement import Agreement, device_types, is_member
from .exchange import STRATEGIES, Exchange
from .slices import Slice, local_slice
from .states import add_incoming_, copy_integers, outgoing_state, power


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
    of a slice computed from zero, `S_r` its incoming state, and i the index of a token within the slice:

        S_{r+1} = λ^{n_r} S_r + M_r        o_i = (output within the slice) + scale λ^{i+1} S_rᵀ q_i

    Outputs and gradients equal those of one process. Only the states `[B, H, K, V]` and their gradients are sent, while
    the attention within the slice runs. Every rank must make the call, and its backward pass if gradients are needed.

    The ranks compare their calls before a state is sent: an error on one rank, or a difference, raises on every rank.

    Args:
        q: queries of this rank's tokens `[B, n_r, H, K]`.
        k: keys, the shape and dtype of q.
        v: values `[B, n_r, H, V]`, the dtype of q.
        log_decay: `[H]` float32, natural logarithm of the decay per token, <= 0, the same on every rank; None is no
            decay.
        group: a `torch.distributed` process group; None is the default group. Its backend must serve the device of q;
            gloo cannot send tensors of a GPU, which "ring" needs.
        scale: factor on every output.
        initial_state: `[N, H, K, V]`, given by every rank or none. Read by the rank on which a sequence begins, which
            gets its gradient; zero elsewhere.
        output_final_state: also return the states after the last tokens.
        cu_seqlens: `[N + 1]` bounds of the sequences in the tokens of all ranks, the same on every rank, B = 1. A
            sequence may lie on any number of ranks. Read by the host, so best on a CPU.
        lengths: n_r of all ranks, given by every rank or none; None exchanges them in the check.
        strategy: how states are sent, "all-gather" or "ring"; see `exchange`, also for the number of bytes.
        backend: see `lightning_attention.lightning_attention`.
        check: compare the calls of all ranks, in one small collective that the host waits for. False, on every rank,
            compares nothing and needs `lengths`: after an error on one rank the others then wait until a timeout.

    Returns:
        `output` `[B, n_r, H, V]`, and `final_state` `[N, H, K, V]` or None: the state of a sequence on the rank where
        the sequence ends, zero elsewhere. Without `cu_seqlens` sequences begin on the first rank and end on the last;
        with it, on the ranks of their first and last tokens. An empty sequence lies on the first rank whose slice
        reaches it.

    Raises:
        ValueError, TypeError, NotImplementedError: an argument does not fit, as for one process; the strategy is
            unknown; the process is not in the group; lengths do not fit; the ranks differ; or another rank raised.
        RuntimeError: another rank raised an error of another type.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from lightning_attention import distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun starts several
        >>> q, k, v = torch.randn(3, 1, 100, 4, 16).unbind()
        >>> distributed.lightning_attention(q, k, v, torch.full((4,), -0.1)).output.shape
        torch.Size([1, 100, 4, 16])
        >>> dist.destroy_process_group()

    Source: LASP-2 (arXiv 2502.07563), here with a decay; ZeCO (arXiv 2507.01004).
    """
    with Agreement(group, q, enabled=check is not False) as agreement:
        if not isinstance(check, bool):
            raise TypeError(f"check must be True or False, got {type(check).__name__}")
        inputs, others = {"q": q, "k": k, "v": v}, {"log_decay": log_decay, "initial_state": initial_state}
        check_tensors(inputs, {**others, "cu_seqlens": cu_seqlens})
        autograd.refuse_gradient(log_decay)
        refuse_transforms("distributed.lightning_attention", inputs | others)
        scale = checked_scale(scale)
        check_bool("output_final_state", output_final_state)
        check_backend(backend)
        rank = _check_group(group)
        q, k, v = autocast(q, k, v)
        # May be on another device than q, since the host reads it: only its shape and dtype are checked here.
        seqlens = None if cu_seqlens is None else torch.empty_like(cu_seqlens, device=q.device)
        problem = Problem.of_attention(AttentionInputs(q, k, v, log_decay, initial_state, seqlens))
        if q.device.type not in (types := device_types(group)):
            raise ValueError(f"q must be on a device that the backend of the group serves, {types}, got {q.device}")
        backend = choose_backend(backend, problem)
        if not isinstance(strategy, str):
            raise TypeError(f"strategy must be a string, got {type(strategy).__name__}")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
        if lengths is not None:
            lengths = _check_lengths(lengths, problem.length, rank, dist.get_world_size(group))
        elif not check:
            raise ValueError("lengths must be given with check=False: no rank is asked for its length")
        check_log_decay(log_decay.cpu() if check and log_decay is not None else log_decay)
        if check:
            cu_seqlens = None if cu_seqlens is None else cu_seqlens.cpu()
            options = {"strategy": strategy, "scale": scale, "output_final_state": output_final_state}
            terms = _terms(problem, k, v, log_decay, initial_state, cu_seqlens) | options | {"lengths": lengths}
            lengths = agreement.compare(problem.length, terms)
    assert lengths is not None
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, sum(lengths))
    local = local_slice(rank, lengths, bounds)
    num_sequences = 1 if bounds is None else problem.num_states
    state_decay = finite_log_decay(q, log_decay)
    exchange = Exchange(strategy, local, state_decay, group)

    initial = None if initial_state is None else _local_states(initial_state, local, num_sequences)
    outgoing, k, v = outgoing_state(k, v, initial, state_decay, local, backend)
    started = exchange.start(outgoing)
    o, final = attend(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=None if initial is None else initial.flatten(0, 1),
        output_final_state=output_final_state,
        cu_seqlens=None if bounds is None else copy_integers(local.cu_seqlens, like=q),
        backend=backend,
    )
    incoming = exchange.finish(started)
    o = add_incoming_(o, q, incoming, state_decay, local.prefix_length, scale, backend)
    if final is not None:
        final = _global_states(final, incoming * power(state_decay, local.prefix_length), local, num_sequences)
    return LightningAttentionOutput(o, final)


def _terms(
    problem: Problem,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> dict[str, object]:
    """Sizes and values that must be equal on every rank."""
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


def _local_states(initial_state: Tensor, local: Slice, num_sequences: int) -> Tensor:
    """States before the sequences of this rank `[D, B, H, K, V]`; zero for a sequence that begins elsewhere."""
    states = initial_state.unflatten(0, (num_sequences, -1 if num_sequences else 1))
    first = local.sequences.start + local.starts_inside
    return _pad(states[first : local.sequences.stop], int(local.starts_inside), 0)


def _global_states(states: Tensor, incoming: Tensor, local: Slice, num_sequences: int) -> Tensor:
    """States after all sequences `[N, H, K, V]`; zero for a sequence that does not end on this rank.

    `incoming` is the decayed incoming state, which is added to the state of the first sequence.
    """
    first, count = local.sequences.start, len(local.sequences)
    states = states.unflatten(0, (count, incoming.shape[0])) + _pad(incoming[None], 0, count - 1)
    ended = count - local.ends_inside
    return _pad(states[:ended], first, num_sequences - first - ended).flatten(0, 1)


def _pad(states: Tensor, before: int, after: int) -> Tensor:
    """Add zeros before and after the first of five dimensions; negative numbers cut."""
    return F.pad(states, (*(0,) * 8, before, after))


def _check_group(group: "dist.ProcessGroup | None") -> int:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group must be initialised: call torch.distributed.init_process_group first")
    if not is_member(group):
        if not isinstance(group, (dist.ProcessGroup, type(dist.GroupMember.NON_GROUP_MEMBER))):
            raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
        raise ValueError(f"group must contain this process, got one without rank {dist.get_rank()}")
    return dist.get_rank(group)


def _check_lengths(lengths: object, length: int, rank: int, world_size: int) -> list[int]:
    expected = f"the numbers of tokens of {world_size} ranks, {length} of rank {rank}"
    if not isinstance(lengths, Sequence) or isinstance(lengths, (str, bytes)):
        raise TypeError(f"lengths must be {expected}, got {type(lengths).__name__}")
    if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in lengths):
        raise TypeError(f"lengths must be integers, {expected}, got {list(lengths)}")
    lengths = [int(n) for n in lengths]
    if len(lengths) != world_size or min(lengths) < 0 or lengths[rank] != length:
        raise ValueError(f"lengths must be {expected}, got {lengths}")
    return lengths
