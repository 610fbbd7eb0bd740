"""The public functions of decoding: steps, and the drafts of speculative decoding."""

from itertools import pairwise

import torch
from torch import Tensor

from . import autograd, custom_ops
from .api import lightning_attention, refuse_gradients
from .backends import check_inputs
from .decoding_state import DecodingState
from .inputs import DecodingInputs
from .paths import draft_paths, take
from .problem import check_backend, check_tensors, checked_scale


def lightning_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor | DecodingState,
    scale: float = 1.0,
    state_indices: Tensor | None = None,
    saved_indices: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Decoding: the next token, or the next few, of every sequence; updates `state` in place.

    The formula is that of `lightning_attention`. For inference: nothing is kept for a backward pass. With
    `saved_indices` the state after every token goes to a slot of its own, as engines want it that verify drafts and go
    on from the last one that they accept.

    Args:
        q: queries `[B, H, K]` for one token or `[B, T, H, K]` for a few; dtypes as for `lightning_attention`.
        k: keys, the shape and dtype of q.
        v: values `[B, H, V]` or `[B, T, H, V]`, the dtype of q.
        log_decay: `[H]` float32, natural logarithm of the decay per token, <= 0; None is no decay.
        state: `[N, H, K, V]` float32 (float64 for float64 inputs), updated in place; or bfloat16, for storage alone,
            with arithmetic in float32. Without `state_indices`, N = B. Or a `DecodingState`, whose state is written
            once in a chunk: the output then has the bits of an invariant `lightning_attention` over all tokens.
        scale: factor on every output.
        state_indices: `[B]` int32 or int64, the slot of `state` that each batch row uses, each slot at most once. A
            batch row with -1 is padding: it changes no state and its output is zero.
        saved_indices: `[B, T]` int32 or int64 (`[B]` for one token `[B, H, K]`), the slot of `state` that receives the
            state after each token; -1 is none. The slots differ. The slot that a batch row reads is then not updated,
            unless it is one of those that the batch row writes; several batch rows may read one slot. Not with a
            `DecodingState`.
        backend: as for `lightning_attention`.

    Returns:
        The output, with the shape of v and the dtype of q.

    Raises:
        ValueError, TypeError, NotImplementedError: as `lightning_attention`; ValueError also when a gradient would be
            needed, since none is kept.

    Example:
        >>> import torch
        >>> from lightning_attention import lightning_attention_step
        >>> q = torch.randn(1, 2, 16)
        >>> state = torch.zeros(1, 2, 16, 16)
        >>> lightning_attention_step(q, q, q, state=state).shape
        torch.Size([1, 2, 16])

    Source: Lightning Attention-2 (arXiv 2401.04658), equation 4.
    """
    pool = state.state if isinstance(state, DecodingState) else state
    inputs = {"q": q, "k": k, "v": v, "state": pool}
    check_tensors(inputs, {"log_decay": log_decay, "state_indices": state_indices, "saved_indices": saved_indices})
    scale = checked_scale(scale)
    check_backend(backend)
    if autograd.is_needed(q, k, v, log_decay, pool):
        refuse_gradients("lightning_attention_step", inputs, log_decay)
    if isinstance(state, DecodingState):
        if saved_indices is not None:
            raise ValueError("saved_indices go with plain states: select slots of a DecodingState to copy them")
        state.check()
        if q.dim() == 3:
            q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
            return _append(q, k, v, log_decay, state, state_indices, scale, backend).squeeze(1)
        return _append(q, k, v, log_decay, state, state_indices, scale, backend)
    return custom_ops.step(q, k, v, log_decay, state, state_indices, scale, backend, saved_indices)


def lightning_attention_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor | DecodingState,
    parents: Tensor | None = None,
    scale: float = 1.0,
    state_indices: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Speculative decoding: the outputs of T drafts of every sequence; `state` is not changed.

    Draft i has depth d_i: it is number d_i on its path from the state. With j over its ancestors and itself:

        o_i = scale (λ^d_i Sᵀ q_i + Σ_j λ^(d_i - d_j) (q_i k_j) v_j)

    No state is kept for a draft. `lightning_attention_commit` then accepts some of them. From a `DecodingState`, the
    outputs of a draft have the bits of steps over its path; drafts of a tree are then computed path by path.

    A draft with NaN or inf may reach the outputs of all drafts of its sequence, in every backend but "reference".

    Args:
        q: queries of the drafts `[B, T, H, K]`; dtypes as for `lightning_attention`.
        k: keys, the shape and dtype of q.
        v: values `[B, T, H, V]`, the dtype of q.
        log_decay: `[H]` float32, natural logarithm of the decay per token, <= 0; None is no decay.
        state: as for `lightning_attention_step`, before the drafts.
        parents: `[B, T]` int32 or int64, a tree of drafts: the index of the draft that each draft follows, less than
            its own; -1 if it follows the state. None is a chain.
        scale: factor on every output.
        state_indices: `[B]` int32 or int64, as for `lightning_attention_step`; the output of a batch row with -1 is
            zero.
        backend: as for `lightning_attention`.

    Returns:
        The output `[B, T, H, V]` in the dtype of q.

    Example:
        >>> import torch
        >>> from lightning_attention import lightning_attention_verify
        >>> drafts = torch.randn(1, 4, 2, 16)
        >>> lightning_attention_verify(drafts, drafts, drafts, state=torch.zeros(1, 2, 16, 16)).shape
        torch.Size([1, 4, 2, 16])

    Raises:
        ValueError, TypeError, NotImplementedError: as `lightning_attention_step`.
    """
    pool = state.state if isinstance(state, DecodingState) else state
    inputs = {"q": q, "k": k, "v": v, "state": pool}
    check_tensors(inputs, {"log_decay": log_decay, "parents": parents, "state_indices": state_indices})
    scale = checked_scale(scale)
    check_backend(backend)
    if autograd.is_needed(q, k, v, log_decay, pool):
        refuse_gradients("lightning_attention_verify", inputs, log_decay)
    if isinstance(state, DecodingState):
        state.check()
        return _verify(q, k, v, log_decay, state, parents, state_indices, scale, backend)
    return custom_ops.verify(q, k, v, log_decay, state, state_indices, parents, scale, backend)


def lightning_attention_commit(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor | DecodingState,
    last: Tensor,
    parents: Tensor | None = None,
    state_indices: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Speculative decoding: accept drafts; updates `state` in place.

    The result is the state of `lightning_attention_step` over the accepted drafts, one by one; to the last bit if
    the state is float32, or a `DecodingState`.

    Args:
        k: keys of the drafts `[B, T, H, K]`, as given to `lightning_attention_verify`.
        v: values `[B, T, H, V]`, likewise.
        log_decay: `[H]` float32, likewise.
        state: likewise; updated in place.
        last: `[B]` int32 or int64, the last accepted draft of every batch row; its ancestors are accepted too. -1 is
            none. In a chain, the number of accepted drafts less one.
        parents: `[B, T]`, as given to `lightning_attention_verify`.
        state_indices: `[B]`, likewise; a batch row with -1 changes nothing.
        backend: as for `lightning_attention`.

    Example:
        >>> import torch
        >>> from lightning_attention import lightning_attention_commit
        >>> drafts, state = torch.randn(1, 4, 2, 16), torch.zeros(1, 2, 16, 16)
        >>> lightning_attention_commit(drafts, drafts, state=state, last=torch.tensor([1]))

    Raises:
        ValueError, TypeError, NotImplementedError: as `lightning_attention_step`.
    """
    pool = state.state if isinstance(state, DecodingState) else state
    inputs = {"k": k, "v": v, "state": pool, "last": last}
    check_tensors(inputs, {"log_decay": log_decay, "parents": parents, "state_indices": state_indices})
    check_backend(backend)
    if autograd.is_needed(k, v, log_decay, pool):
        refuse_gradients("lightning_attention_commit", inputs, log_decay)
    if isinstance(state, DecodingState):
        state.check()
        _commit(k, v, log_decay, state, last, parents, state_indices, backend)
        return
    custom_ops.commit(k, k, v, log_decay, state, state_indices, parents, last, backend)


def attend_with_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    state: DecodingState,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Output of tokens after those of decoding states, which are not changed, with gradients to q, k and v.

    The tokens of the rings and the new ones are sequences that begin at a chunk boundary.
    """
    state.check()
    B, T = q.shape[:2]
    bounds = [row * T for row in range(B + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    counts = state.count[:, 0].tolist()
    rings = (None, state.keys, state.values)
    q, k, v = (_after_rings(x.flatten(0, 1), ring, bounds, counts) for x, ring in zip((q, k, v), rings, strict=True))
    ends = torch.tensor([0, *counts]).cumsum(0) + torch.tensor(bounds)
    o = lightning_attention(
        q,
        k,
        v,
        log_decay,
        initial_state=state.state.clone(),
        cu_seqlens=ends.to(q.device),
        invariant=True,
    ).output[0]
    parts = [
        o[end - (stop - start) : end] for end, (start, stop) in zip(ends[1:].tolist(), pairwise(bounds), strict=True)
    ]
    return torch.cat(parts).view(B, T, *o.shape[1:])


def _after_rings(x: Tensor, ring: Tensor | None, bounds: list[int], counts: list[int]) -> Tensor:
    """Tokens `[1, L, H, D]`: of each sequence those of its ring, or zeros for queries, and then its own of `x`."""
    parts = []
    for n, (count, (start, stop)) in enumerate(zip(counts, pairwise(bounds), strict=True)):
        old = x.new_zeros(count, *x.shape[1:]) if ring is None else ring[n, :, :count].transpose(0, 1)
        parts += [old, x[start:stop]]
    return torch.cat(parts)[None]


def _append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: DecodingState,
    state_indices: Tensor | None,
    scale: float,
    backend: str,
    lengths: Tensor | None = None,
) -> Tensor:
    return custom_ops.append(q, k, v, log_decay, *state, state_indices, None, None, lengths, scale, backend)


def _verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: DecodingState,
    parents: Tensor | None,
    state_indices: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    """A chain is read as a sequence that is not kept; of a tree, the path of every draft is one."""
    q, k, v = custom_ops.autocast(q, k, v)
    check_inputs("verify", DecodingInputs(q, k, v, log_decay, state.state, state_indices, parents), "auto")
    if parents is None:
        return custom_ops.attend(q, k, v, log_decay, *state, state_indices, None, None, None, scale, backend)
    order, depth = draft_paths(parents)
    B, T = parents.shape
    slots = torch.arange(B, device=q.device) if state_indices is None else state_indices
    q, k, v = (take(x, order).flatten(0, 1) for x in (q, k, v))
    lengths, slots = depth.flatten(), slots.repeat_interleave(T)
    o = custom_ops.attend(q, k, v, log_decay, *state, slots, None, None, lengths, scale, backend)
    return take(o, lengths - 1).unflatten(0, (B, T))


def _commit(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: DecodingState,
    last: Tensor,
    parents: Tensor | None,
    state_indices: Tensor | None,
    backend: str,
) -> None:
    k, v = custom_ops.autocast(k, v)
    check_inputs("commit", DecodingInputs(k, k, v, log_decay, state.state, state_indices, parents, last), "auto")
    if not k.numel():
        return
    last = last.clamp(-1, k.shape[1] - 1).long()  # values on an accelerator are not checked
    lengths = last + 1
    if parents is not None:
        order, depth = draft_paths(parents)
        k, v = (take(x, take(order, last.clamp_min(0))) for x in (k, v))
        lengths = torch.where(last >= 0, take(depth, last.clamp_min(0)), 0)
    _append(k, k, v, log_decay, state, state_indices, 1.0, backend, lengths)
