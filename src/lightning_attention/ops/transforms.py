"""The operators under transforms: forward mode is refused, `torch.vmap` folds the mapped dimension into the heads."""

from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

# The dimension of heads, counted from the last, of every argument that has heads.
HEADS = {
    "q": -2,
    "k": -2,
    "v": -2,
    "do": -2,
    "log_decay": -1,
    "initial_state": -3,
    "d_final_state": -3,
    "state": -3,
}


def is_transformed() -> bool:
    """Whether a transform of torch.func is active, or forward mode."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_tangents(function: str, **inputs: Any) -> None:
    """Refuse forward mode, of which nothing would be seen but a tangent of zero."""
    if forward_ad._current_level < 0:
        return
    for name, x in inputs.items():
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{function} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, forward_ad), "
                f"and {name} has a tangent: use reverse mode (torch.func.grad, vjp, jacrev)"
            )


def refuse_transforms(function: str, **inputs: Any) -> None:
    """Refuse torch.func altogether, and forward mode."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(f"{function} does not run under the transforms of torch.func: use autograd")
    refuse_tangents(function, **inputs)


def register_autograd(operator: Any, reverse: type[torch.autograd.Function] | None) -> None:
    """Makes forward mode raise for an operator, and gives it the gradient of `reverse`, an `autograd.Function`."""
    names = [argument.name for argument in operator._schema.arguments]
    function = _public_name(operator)

    def differentiate(*arguments: Any) -> Any:
        refuse_tangents(function, **dict(zip(names, arguments, strict=True)))
        if reverse is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            # The dispatcher has chosen the level of torch.func's transforms; Function.apply would choose one again.
            base: Any = super(torch.autograd.Function, reverse)
            with enable_single_level_autograd_function():
                return base.apply(*arguments)
        return below_autograd(operator, *arguments)

    torch.library.impl(operator.name(), "Autograd", differentiate)


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """What is below the innermost transform: the outer ones, for which the modes of an `autograd.Function` end here."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def register_vmap(operator: Any, output_heads: tuple[int, ...]) -> None:
    """Maps an operator over a dimension by folding it into the heads, which do not know of each other.

    Args:
        operator: an overload.
        output_heads: the dimension of heads of every output, counted from the last.
    """
    names = [argument.name for argument in operator._schema.arguments]
    is_mutated = operator._schema.is_mutable

    def mapped(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        folded = {}
        for name, dim, x in zip(names, in_dims, arguments, strict=True):
            if name in HEADS and x is not None:
                if is_mutated and name == "state" and dim is None:
                    raise NotImplementedError(
                        f"{_public_name(operator)} updates state in place: torch.vmap has to map over state too"
                    )
                folded[name] = _fold(x, dim, HEADS[name], info.batch_size)
            elif dim is not None:
                raise NotImplementedError(
                    f"{_public_name(operator)} cannot be mapped over {name} by torch.vmap: all share one"
                )
            else:
                folded[name] = x
        outputs = operator(*folded.values())
        if is_mutated:
            at = names.index("state")
            arguments[at].movedim(in_dims[at], 0).copy_(_unfold(folded["state"], HEADS["state"], info.batch_size))
        if outputs is None:
            return None, None
        if isinstance(outputs, Tensor):
            return _unfold(outputs, output_heads[0], info.batch_size), 0
        # The empty tensor that an operator returns in place of None has no heads.
        pairs = [
            (_unfold(x, heads, info.batch_size), 0) if x.dim() > 1 else (x, None)
            for x, heads in zip(outputs, output_heads, strict=True)
        ]
        return tuple(x for x, _ in pairs), tuple(dim for _, dim in pairs)

    torch.library.register_vmap(operator.name(), mapped)


def _fold(x: Tensor, dim: int | None, heads: int, size: int) -> Tensor:
    """The mapped dimension, or `size` times the tensor, joined with the heads."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, heads - 1).flatten(heads - 1, heads)


def _unfold(x: Tensor, heads: int, size: int) -> Tensor:
    """The mapped dimension back, as the first."""
    return x.unflatten(heads, (size, x.shape[heads] // size)).movedim(heads - 1, 0)


def _public_name(operator: Any) -> str:
    name = operator.name().split("::")[1]
    return "lightning_attention" if name in ("forward", "backward") else f"lightning_attention_{name}"
