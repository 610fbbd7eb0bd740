"""The public calls: document, check, choose a backend, call."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import library
from .problem import Problem


class LightningAttentionOutput(NamedTuple):
    """What `lightning_attention` returns."""

    output: Tensor
    final_state: Tensor | None


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

    Args:
        q: queries `[B, T, H, K]`; float64, float32, bfloat16 or float16, any strides.
        k: keys, the shape and dtype of q.
        v: values `[B, T, H, V]`, the dtype of q. V may differ from K.
        log_decay: `[H]` float32, natural logarithm of the decay per token, <= 0; None is no decay. `decay.log_decay`
            makes those of known checkpoints. Receives no gradient.
        scale: factor on every output.
        initial_state: `[N, H, K, V]` float32 (float64 for float64 inputs), the state before the first token; N is
            the number of sequences: B, or that of `cu_seqlens`.
        output_final_state: also return the state after the last token.
        cu_seqlens: `[N + 1]` int32 or int64: sequence n is `[cu_seqlens[n], cu_seqlens[n + 1])` of the only row
            (B = 1). Rises from 0 to T; empty sequences are legal and keep their initial state.
        backend: "auto" takes the first of `library.BACKENDS` that can run the call; a name insists on that one.

    Returns:
        `output` `[B, T, H, V]` in the dtype of q, and `final_state` `[N, H, K, V]` or None. Gradients flow from both
        to q, k, v and initial_state.

    Raises:
        ValueError: a shape, range or device does not fit, log_decay requires a gradient, or the backend is unknown.
            Values of tensors on an accelerator are not read, so these are not checked.
        TypeError: a dtype does not fit.
        NotImplementedError: the named backend cannot run the call; the message says why.

    Source: Lightning Attention-2 (arXiv 2401.04658), algorithms 1 and 2.
    """
    q, k, v = _autocast(q, k, v)
    problem = Problem.of_attention(q, k, v, log_decay, initial_state, cu_seqlens)
    backend = library.choose_backend(backend, problem)
    o, final_state = library.attention(
        q, k, v, log_decay, initial_state, cu_seqlens, float(scale), output_final_state, backend
    )
    return LightningAttentionOutput(o, final_state)


def lightning_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor,
    scale: float = 1.0,
    state_indices: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Decoding: the next token, or the next few, of every sequence; updates `state` in place.

    The same formula as `lightning_attention`, for inference: nothing is kept for a backward pass.

    Args:
        q: queries `[B, H, K]` for one token or `[B, T, H, K]` for a few; dtypes as for `lightning_attention`.
        k: keys, the shape and dtype of q.
        v: values `[B, H, V]` or `[B, T, H, V]`, the dtype of q.
        log_decay: `[H]` float32, natural logarithm of the decay per token, <= 0; None is no decay.
        state: `[N, H, K, V]` float32 (float64 for float64 inputs), updated in place. Without `state_indices`, N = B.
        scale: factor on every output.
        state_indices: `[B]` int32 or int64, the slot of `state` that each row uses, each slot at most once. A row
            with -1 is padding: it changes no state and its output is zero.
        backend: as for `lightning_attention`.

    Returns:
        The output, with the shape of v and the dtype of q.

    Raises:
        ValueError, TypeError, NotImplementedError: as `lightning_attention`; ValueError also when a gradient would be
            needed, since none is kept.

    Source: Lightning Attention-2 (arXiv 2401.04658), equation 4.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, state)):
        raise ValueError("lightning_attention_step keeps no gradient: call it under torch.no_grad()")
    q, k, v = _autocast(q, k, v)
    if q.dim() not in (3, 4):
        raise ValueError(f"q must be [B, H, K] or [B, T, H, K], got shape {tuple(q.shape)}")
    one_token = q.dim() == 3
    if one_token and k.dim() == 3 and v.dim() == 3:
        q, k, v = q[:, None], k[:, None], v[:, None]
    problem = Problem.of_step(q, k, v, log_decay, state, state_indices)
    backend = library.choose_backend(backend, problem)
    o = library.step(q, k, v, log_decay, state, state_indices, float(scale), backend)
    return o[:, 0] if one_token else o


def _autocast(*inputs: Tensor) -> list[Tensor]:
    """As for PyTorch's own matrix products: what is on the device being autocast is cast, float64 is not."""
    device = inputs[0].device.type
    if not library.is_autocast_enabled(device):
        return list(inputs)
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in inputs]
