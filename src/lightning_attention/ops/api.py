"""The public functions, all of one shape: check kinds of arguments, then an operator checks the rest and runs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import autograd, custom_ops
from .backends import check_inputs
from .decoding_state import DecodingState
from .inputs import AttentionInputs, SlotPrefillInputs
from .problem import Problem, check_backend, check_bool, check_tensors, checked_scale, integers
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
    invariant: bool = False,
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
        invariant: compute results of a sequence that do not depend, to the last bit, on the batch size, on packing, on
            the place of the sequence in the batch or on other sequences. They are those of a `DecodingState` that
            reads the sequence in any pieces. "auto" then chooses by device, dtype and head sizes alone, and a sequence
            is not cut for several programs of a GPU. docs/determinism.md says what is equal to what.

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
    check_bool("output_final_state", output_final_state)
    check_backend(backend)
    check_bool("invariant", invariant)
    run = autograd.attention if autograd.is_needed(q, k, v, log_decay, initial_state) else custom_ops.forward
    results = run(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend, invariant)
    return LightningAttentionOutput(*results)


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
        refuse_gradients("lightning_attention_prefill", {**inputs, "initial_state": initial_state}, log_decay)
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
    state: Tensor | DecodingState,
    state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    state_positions: Tensor | Sequence[int] | None = None,
    saved_indices: Tensor | None = None,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    invariant: bool = False,
) -> Tensor:
    """Prefill in a pool of states: `lightning_attention` without gradients, from slots of `state` and to them.

    Each sequence starts from its slot and leaves the state after its last token there, as engines that serve many
    requests need it.

    Args:
        q, k, v, log_decay, scale, cu_seqlens, backend: as for `lightning_attention`.
        state: the pool, as for `lightning_attention_step`, updated in place.
        state_indices: `[N]` int32 or int64, the slot of each sequence; the slots differ. None is slots 0 to N - 1, of
            a pool of N. A sequence with -1 starts from zero, and its state is not kept.
        has_initial_state: `[N]` bool, False for a sequence that starts from zero and not from what is in its slot.
            None is all True.
        state_positions: `[M]` as for `lightning_attention_prefill`: also keep the states after so many tokens.
        saved_indices: `[B, M]` int32 or int64, the slots for these states, which are none of the sequences' slots; -1
            keeps none.
        invariant: as for `lightning_attention`; needs a `DecodingState`, which then ends with a ring, whose chunks
            begin with the sequence. It keeps no states at positions: give the tokens up to each in a call of its own.

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
    pool = state.state if isinstance(state, DecodingState) else state
    inputs = {"q": q, "k": k, "v": v, "state": pool}
    optional = {"state_indices": state_indices, "has_initial_state": has_initial_state, "saved_indices": saved_indices}
    check_tensors(inputs, {"log_decay": log_decay, "cu_seqlens": cu_seqlens, **optional})
    if (state_positions is None) != (saved_indices is None):
        raise ValueError("state_positions and saved_indices go together: give both or neither")
    scale = checked_scale(scale)
    check_backend(backend)
    check_bool("invariant", invariant)
    if invariant and not isinstance(state, DecodingState):
        raise ValueError("invariant prefill needs a DecodingState: a plain state forgets where the last chunk began")
    if invariant and state_positions is not None:
        raise ValueError("invariant prefill keeps no states at positions: give the tokens up to each in a call")
    if autograd.is_needed(q, k, v, log_decay, pool):
        refuse_gradients("lightning_attention_prefill_", inputs, log_decay)
    if isinstance(state_positions, Tensor):
        check_tensors({"state_positions": state_positions}, {})
    elif state_positions is not None:
        positions = integers("state_positions", state_positions)
        if q.dim() == 4:  # the operator refuses others
            check_state_positions(positions, q.shape[1])
        state_positions = torch.tensor(positions, dtype=torch.int64, device=q.device)
    slots = state_indices, has_initial_state, state_positions, saved_indices
    if isinstance(state, DecodingState):
        state.check()
        if invariant:
            return custom_ops.append(
                q, k, v, log_decay, *state, state_indices, has_initial_state, cu_seqlens, None, scale, backend
            )
        q, k, v = custom_ops.autocast(q, k, v)
        check_inputs("prefill_", SlotPrefillInputs(q, k, v, log_decay, pool, cu_seqlens, *slots), backend)
        _fold(log_decay, state, state_indices, saved_indices)
    return custom_ops.prefill_(q, k, v, log_decay, pool, cu_seqlens, *slots, scale, backend)


def _fold(
    log_decay: Tensor | None, state: DecodingState, state_indices: Tensor | None, saved_indices: Tensor | None
) -> None:
    """Empty the rings of slots that prefill reads or writes: it leaves plain states."""
    if state_indices is not None and saved_indices is not None:
        state_indices = torch.cat([state_indices.flatten(), saved_indices.flatten().to(state_indices.dtype)])
    state.fold_(log_decay, state_indices)


def refuse_gradients(function: str, inputs: Mapping[str, Tensor | None], log_decay: Tensor | None) -> None:
    if autograd.need_gradients(*inputs.values()):
        raise ValueError(f"{function} keeps no gradient: call it under torch.no_grad()")
    autograd.refuse_gradient(log_decay)
    refuse_tangents(function, {**inputs, "log_decay": log_decay})
