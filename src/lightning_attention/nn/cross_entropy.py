"""Cross-entropy of a linear layer without its logits."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ops import custom_ops, transforms
from ..ops.cross_entropy import accumulation_dtype
from ..ops.problem import check_tensors
from .sizes import check_integer


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the logits `x Wᵀ`, of which only those of a chunk of tokens are in memory at a time.

        loss = Σ_n (logsumexp_v(x_n · w_v) - x_n · w_{label_n})

    Equals `F.cross_entropy(F.linear(x, weight).float(), labels)`. Gradients are computed in the forward pass, chunk by
    chunk; `backward()` scales them. Products are in the dtype of the inputs (under autocast in its dtype), the loss and
    the sum of the gradient of `weight` over chunks are float32 (float64 for float64 inputs).

    A call under the transforms of torch.func, in forward mode, or with tensor subclasses such as DTensor computes all
    logits at once. Otherwise a second derivative raises.

    Args:
        x: hidden states `[..., W]`; float64, float32, bfloat16 or float16.
        weight: `[V, W]`, the dtype of x.
        labels: `[...]` integers in `[0, V)`, or `ignore_index`.
        ignore_index: label of tokens that are left out of the loss.
        reduction: "mean" over the labels that are not ignored (NaN if all are), or "sum".

    Returns:
        Loss in nats, a float32 scalar (float64 for float64 inputs). On an accelerator it is NaN, as are its gradients,
        if a label is out of range: values there are not read by the host.

    Raises:
        IndexError: a label on a CPU is out of range.
        ValueError: a shape or a device does not fit, V is 0, or the reduction is unknown.
        TypeError: a dtype does not fit, an argument is not a tensor, or ignore_index is not an integer.
        NotImplementedError: a second derivative is asked for.

    Source: Liger Kernel (arXiv 2410.10989), section 3.2.

    Example:
        >>> import torch
        >>> from lightning_attention.nn import linear_cross_entropy
        >>> x, weight = torch.zeros(2, 10, 64), torch.randn(256, 64)
        >>> linear_cross_entropy(x, weight, torch.randint(256, (2, 10)))  # log(256)
        tensor(5.5452)
    """
    check_integer("ignore_index", ignore_index)
    x, weight = _checked(x, weight, labels, reduction)
    x, labels = x.reshape(labels.numel(), x.shape[-1]), labels.reshape(-1).long()
    loss = _summed(x, weight, labels, ignore_index)
    return loss if reduction == "sum" else loss / (labels != ignore_index).sum()


def _checked(x: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> tuple[Tensor, ...]:
    """Check the arguments; return x and weight as autocast returns them, differentiably."""
    check_tensors({"x": x, "weight": weight, "labels": labels}, {})
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        shapes = f"shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"x must be [..., W] and weight [V, W], got {shapes}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must be [V, W] with V >= 1, got shape {tuple(weight.shape)}")
    if labels.shape != x.shape[:-1]:
        raise ValueError(f"labels must be [...] = {list(x.shape[:-1])}, got shape {tuple(labels.shape)}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    for name, other in (("weight", weight), ("labels", labels)):
        if other.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {other.device}")
    x, weight = custom_ops.autocast(x, weight)
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must be {x.dtype}, as x, got {weight.dtype}")
    return x, weight


def _summed(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Summed loss of x `[N, W]` and labels `[N]`."""
    if transforms.is_transformed() or any(is_traceable_wrapper_subclass(tensor) for tensor in (x, weight, labels)):
        logits = F.linear(x, weight).to(accumulation_dtype(x.dtype))
        return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    needs_dx, needs_dweight = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight))
    return custom_ops.linear_cross_entropy(x, weight, labels, ignore_index, needs_dx, needs_dweight)[0]
