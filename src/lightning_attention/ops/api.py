"""The public functions, all of one shape: check kinds of arguments, then an operator checks the rest and runs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import autograd, custom_ops
from .problem import (
    AttentionInputs,
    Problem,
    check_backend,
    check_output_final_state,
    check_tensors,
    checked_scale,
    integers,
)
from .transforms import refuse_tangents
from .values import check_state_positions


class LightningAttentionOutput(NamedTuple):
    """Result of `lightning_attention`."""

    output: Tensor
    final_state: Tensor | None = None


class PrefillOutput(NamedTuple):
    """Result of `lightning_attention_prefill`."""

    output: Tensor
    final_state: Tensor
    states: Tensor


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> LightningAttentionOutput:
    """Causal linear attention with a per-head exponential decay, in chunks.

    For every sequence and head, with `λ = exp(log_decay)` and `S_0 = initial_state` (or zero):

        S_t = λ S_{t-1} + k_t v_tᵀ        o_t = scale S_tᵀ q_t

    Time and memory grow linearly with T; the state does not grow. Products are of the inputs as given, accumulation and
    state are float32 (float64 for float64 inputs). Under autocast, q, k and v are cast to the autocast dtype.

    NaN and inf at token t reach outputs from t on, as in the recurrence. In every backend but "reference" they also
    reach outputs before t in the chunk of t, since a masked score is a product with 0. A chunk has at most 64 tokens.
    Other heads, other sequences and earlier chunks are not touched. docs/algorithm.md says which columns and gradients
    are.

    Reverse mode works, also by torch.func.grad, vjp, jacrev and vmap. Forward mode and second derivatives raise.

    Args:
        q: queries `[B, T, H, K]`; float64, float32, bfloat16 or float16, any strides.
        k: keys, the shape and dtype of q.
        v: values `[B, T, H, V]`, the dtype of q. V may differ from K.
        log_decay: `[H]` float32, natural logarithm of the decay per token, <= 0; None is no decay. `decay.log_decay`
            returns those of known checkpoints. Receives no gradient.
        scale: factor on every output.
        initial_state: `[N, H, K, V]` float32 (float64 for float64 inputs), the state before the first token; N is
            the number of sequences: B, or that of `cu_seqlens`.
        output_final_state: also return the state after the last token.
        cu_seqlens: `[N + 1]` int32 or int64: sequence n is `[cu_seqlens[n], cu_seqlens[n + 1])` of the only batch
            row (B = 1). Rises from 0 to T; empty sequences are legal and keep their initial state.
        backend: "auto" takes the first of `ops.backends.BACKENDS` that can run the call and is not slow at it; a name
            takes that backend, or raises.

    Returns:
        `output` `[B, T, H, V]` in the dtype of q, and `final_state` `[N, H, K, V]` or None. Gradients flow from both
        to q, k, v and initial_state.

    Raises:
        ValueError: a shape, range or device does not fit, log_decay requires a gradient, or the backend is unknown.
            Values of tensors on an accelerator are not read, so these are not checked.
        TypeError: a dtype does not fit, or an argument is of another kind: a list in place of a tensor, say.
        NotImplementedError: the named backend cannot run the call, and the message says why; or an input has a
            tangent of forward mode, a second derivative is asked for, or torch.vmap maps over cu_seqlens.

    Example:
        >>> import torch
        >>> from lightning_attention import decay, lightning_attention
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16)
        >>> o, state = lightning_attention(q, k, v, decay.log_decay(2, preset="alibi"), output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 16]), torch.Size([1, 2, 16, 16]))

    Source: Lightning Attention-2 (arXiv 2401.04658), algorithms 1 and 2.
    """
    check_tensors(
        {"q": q, "k": k, "v": v},
        {"log_decay": log_decay, "initial_state": initial_state, "cu_seqlens": cu_seqlens},
    )
    scale = checked_scale(scale)
    check_output_final_state(output_final_state)
    check_backend(backend)
    run = autograd.attention if autograd.is_needed(q, k, v, log_decay, initial_state) else custom_ops.forward
    results = run(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend)
    return LightningAttentionOutput(*results)


def lightning_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor,
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
            with arithmetic in float32. Without `state_indices`, N = B.
        scale: factor on every output.
        state_indices: `[B]` int32 or int64, the slot of `state` that each batch row uses, each slot at most once. A
            batch row with -1 is padding: it changes no state and its output is zero.
        saved_indices: `[B, T]` int32 or int64 (`[B]` for one token `[B, H, K]`), the slot of `state` that receives the
            state after each token; -1 is none. The slots differ. The slot that a batch row reads is then not updated,
            unless it is one of those that the batch row writes; several batch rows may read one slot.
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
    inputs = {"q": q, "k": k, "v": v, "state": state}
    check_tensors(inputs, {"log_decay": log_decay, "state_indices": state_indices, "saved_indices": saved_indices})
    scale = checked_scale(scale)
    check_backend(backend)
    if autograd.is_needed(q, k, v, log_decay, state):
        _refuse_gradients("lightning_attention_step", inputs, log_decay)
    return custom_ops.step(q, k, v, log_decay, state, state_indices, scale, backend, saved_indices)


def lightning_attention_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor,
    parents: Tensor | None = None,
    scale: float = 1.0,
    state_indices: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Speculative decoding: the outputs of T drafts of every sequence; `state` is not changed.

    Draft i has depth d_i: it is number d_i on its path from the state. With j over its ancestors and itself:

        o_i = scale (λ^d_i Sᵀ q_i + Σ_j λ^(d_i - d_j) (q_i k_j) v_j)

    No state is kept for a draft. `lightning_attention_commit` then accepts some of them. A draft with NaN or inf may
    reach the outputs of all drafts of its sequence, in every backend but "reference".

    Args:
        q: queries of the drafts `[B, T, H, K]`; dtypes as for `lightning_attention`.
        k: keys, the shape and dtype of q.
        v: values `[B, T, H, V]`, the dtype of q.
        log_decay: `[H]` float32, natural logarithm of the decay per token, <= 0; None is no decay.
        state: `[N, H, K, V]` as for `lightning_attention_step`, before the drafts.
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
    inputs = {"q": q, "k": k, "v": v, "state": state}
    check_tensors(inputs, {"log_decay": log_decay, "parents": parents, "state_indices": state_indices})
    scale = checked_scale(scale)
    check_backend(backend)
    if autograd.is_needed(q, k, v, log_decay, state):
        _refuse_gradients("lightning_attention_verify", inputs, log_decay)
    return custom_ops.verify(q, k, v, log_decay, state, state_indices, parents, scale, backend)


def lightning_attention_commit(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor,
    last: Tensor,
    parents: Tensor | None = None,
    state_indices: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Speculative decoding: accept drafts; updates `state` in place.

    The result is the state of `lightning_attention_step` over the accepted drafts, one by one; to the last bit if
    the state is float32.

    Args:
        k: keys of the drafts `[B, T, H, K]`, as given to `lightning_attention_verify`.
        v: values `[B, T, H, V]`, likewise.
        log_decay: `[H]` float32, likewise.
        state: `[N, H, K, V]`, likewise; updated in place.
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
    inputs = {"k": k, "v": v, "state": state, "last": last}
    check_tensors(inputs, {"log_decay": log_decay, "parents": parents, "state_indices": state_indices})
    check_backend(backend)
    if autograd.is_needed(k, v, log_decay, state):
        _refuse_gradients("lightning_attention_commit", inputs, log_decay)
    custom_ops.commit(k, k, v, log_decay, state, state_indices, parents, last, backend)


def lightning_attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state_positions: Tensor | Sequence[int],
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> PrefillOutput:
    """`lightning_attention` without gradients, with the states at given positions, to continue from later.

    Args:
        q, k, v, log_decay, scale, initial_state, cu_seqlens, backend: as for `lightning_attention`.
        state_positions: `[M]` int32 or int64, or a list: numbers of tokens, rising from 1 to at most T. With packed
            sequences they count the tokens of the batch row: state p is that of the sequence that holds token p - 1.

    Returns:
        `output` `[B, T, H, V]`, `final_state` `[N, H, K, V]`, and `states` `[B, M, H, K, V]`.

    Example:
        >>> import torch
        >>> from lightning_attention import lightning_attention_prefill
        >>> q = torch.randn(1, 100, 2, 16)
        >>> lightning_attention_prefill(q, q, q, state_positions=[64, 100]).states.shape
        torch.Size([1, 2, 2, 16, 16])

    Raises:
        ValueError, TypeError, NotImplementedError: as `lightning_attention_step`.
    """
    inputs = {"q": q, "k": k, "v": v}
    check_tensors(inputs, {"log_decay": log_decay, "initial_state": initial_state, "cu_seqlens": cu_seqlens})
    scale = checked_scale(scale)
    check_backend(backend)
    if autograd.is_needed(q, k, v, log_decay, initial_state):
        _refuse_gradients("lightning_attention_prefill", {**inputs, "initial_state": initial_state}, log_decay)
    x = AttentionInputs(q, k, v, log_decay, initial_state, cu_seqlens)
    if isinstance(state_positions, Tensor):
        check_tensors({"state_positions": state_positions}, {})
    else:
        positions = integers("state_positions", state_positions)
        cast = x._replace(**dict(zip(inputs, custom_ops.autocast(q, k, v), strict=True)))
        check_state_positions(positions, Problem.of_attention(cast).length)
        state_positions = torch.tensor(positions, dtype=torch.int64, device=q.device)
    return PrefillOutput(*custom_ops.prefill(*x, state_positions, scale, backend))


def lightning_attention_prefill_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor,
    state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    state_positions: Tensor | Sequence[int] | None = None,
    saved_indices: Tensor | None = None,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Prefill in a pool of states: `lightning_attention` without gradients, from slots of `state` and to them.

    Each sequence starts from its slot and leaves the state after its last token there, as engines that serve many
    requests need it.

    Args:
        q, k, v, log_decay, scale, cu_seqlens, backend: as for `lightning_attention`.
        state: the pool `[num_slots, H, K, V]` as for `lightning_attention_step`, updated in place.
        state_indices: `[N]` int32 or int64, the slot of each sequence; the slots differ. None is slots 0 to N - 1, of
            a pool of N. A sequence with -1 starts from zero, and its state is not kept.
        has_initial_state: `[N]` bool, False for a sequence that starts from zero and not from what is in its slot.
            None is all True.
        state_positions: `[M]` as for `lightning_attention_prefill`: also keep the states after so many tokens.
        saved_indices: `[B, M]` int32 or int64, the slots for these states, which are none of the sequences' slots; -1
            keeps none.

    Returns:
        The output `[B, T, H, V]` in the dtype of q.

    Example:
        >>> import torch
        >>> from lightning_attention import lightning_attention_prefill_
        >>> q, pool = torch.randn(1, 100, 2, 16), torch.zeros(8, 2, 16, 16)
        >>> cu_seqlens, slots = torch.tensor([0, 70, 100]), torch.tensor([5, 2])
        >>> lightning_attention_prefill_(q, q, q, state=pool, state_indices=slots, cu_seqlens=cu_seqlens).shape
        torch.Size([1, 100, 2, 16])

    Raises:
        ValueError, TypeError, NotImplementedError: as `lightning_attention_step`.
    """
    inputs = {"q": q, "k": k, "v": v, "state": state}
    optional = {"state_indices": state_indices, "has_initial_state": has_initial_state, "saved_indices": saved_indices}
    check_tensors(inputs, {"log_decay": log_decay, "cu_seqlens": cu_seqlens, **optional})
    if (state_positions is None) != (saved_indices is None):
        raise ValueError("state_positions and saved_indices go together: give both or neither")
    scale = checked_scale(scale)
    check_backend(backend)
    if autograd.is_needed(q, k, v, log_decay, state):
        _refuse_gradients("lightning_attention_prefill_", inputs, log_decay)
    if isinstance(state_positions, Tensor):
        check_tensors({"state_positions": state_positions}, {})
    elif state_positions is not None:
        positions = integers("state_positions", state_positions)
        if q.dim() == 4:  # the operator refuses others
            check_state_positions(positions, q.shape[1])
        state_positions = torch.tensor(positions, dtype=torch.int64, device=q.device)
    slots = state_indices, has_initial_state, state_positions, saved_indices
    return custom_ops.prefill_(q, k, v, log_decay, state, cu_seqlens, *slots, scale, backend)


def _refuse_gradients(function: str, inputs: Mapping[str, Tensor | None], log_decay: Tensor | None) -> None:
    if autograd.need_gradients(*inputs.values()):
        raise ValueError(f"{function} keeps no gradient: call it under torch.no_grad()")
    autograd.refuse_gradient(log_decay)
    refuse_tangents(function, {**inputs, "log_decay": log_decay})
