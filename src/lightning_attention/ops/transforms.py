"""The operators under transforms: forward mode is refused, `torch.vmap` folds the mapped dimension into the heads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Dimension of heads, counted from the last, of each argument that has heads.
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


def is_functional() -> bool:
    """True if a transform of torch.func is active."""
    return torch._C._are_functorch_transforms_active()


def is_transformed() -> bool:
    """True if a transform of torch.func is active, or forward mode."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_tangents(function: str, inputs: Mapping[str, Any]) -> None:
    """Refuse forward mode, which would otherwise give a tangent of zero."""
    if forward_ad._current_level < 0:
        return
    for name, x in inputs.items():
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise no_forward_mode(function, name)


def no_forward_mode(function: str, name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{function} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, forward_ad), "
        f"and {name} has a tangent: use reverse mode (torch.func.grad, vjp, jacrev)"
    )


def refuse_transforms(function: str, inputs: Mapping[str, Any]) -> None:
    """Refuse all transforms of torch.func, and forward mode."""
    if is_functional():
        raise NotImplementedError(f"{function} does not run under the transforms of torch.func: use autograd")
    refuse_tangents(function, inputs)


def register_vmap(operator: Any, output_heads: tuple[int, ...]) -> None:
    """Register the rule `mapped_over_heads` for an operator without a gradient."""
    names = [argument.name for argument in operator._schema.arguments]
    mapped_state = "state" if operator._schema.is_mutable else None
    function = f"lightning_attention_{_name(operator)}"
    mapped = mapped_over_heads(function, operator, names, output_heads, mapped_state)

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        refuse_tangents(function, dict(zip(names, arguments, strict=False)))  # jvp around vmap
        return mapped(info, in_dims, *arguments)

    torch.library.register_vmap(operator.name(), rule)


def refuse_vmap(operator: Any) -> None:
    """Register a rule that raises."""

    def rule(*_: Any) -> tuple[Any, Any]:
        raise NotImplementedError("torch.vmap does not map over decoding states: give all sequences in one call")

    torch.library.register_vmap(operator.name(), rule)


def mapped_over_heads(
    function: str, call: Callable, names: Sequence[str], output_heads: tuple[int, ...], mutated: str | None = None
) -> Callable:
    """A rule of `torch.vmap`: the mapped dimension is folded into the heads, which are independent.

    Args:
        function: the public name, for errors.
        call: takes arguments of these names.
        names: of the arguments.
        output_heads: the dimension of heads of every output, counted from the last.
        mutated: the argument that is updated in place.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        folded = {}
        # PyTorch leaves out the last arguments where they are the defaults of the schema.
        for name, dim, x in zip(names, in_dims, arguments, strict=False):
            if name in HEADS and x is not None:
                if name == mutated and dim is None:
                    raise NotImplementedError(
                        f"{function} updates {name} in place: torch.vmap has to map over {name} too"
                    )
                folded[name] = _fold(x, dim, HEADS[name], info.batch_size)
            elif dim is not None:
                raise NotImplementedError(f"{function} cannot be mapped over {name} by torch.vmap: all share one")
            else:
                folded[name] = x
        outputs = call(*folded.values())
        if mutated is not None:
            at = names.index(mutated)
            state = _unfold(folded[mutated], HEADS[mutated], info.batch_size)
            arguments[at].movedim(in_dims[at], 0).copy_(state)
        if outputs is None:
            return None, None
        if isinstance(outputs, Tensor):
            return _unfold(outputs, output_heads[0], info.batch_size), 0
        # The last outputs, which are states, may not be asked for.
        unfolded = [_unfold(x, heads, info.batch_size) for x, heads in zip(outputs, output_heads, strict=False)]
        return tuple(unfolded), (0,) * len(unfolded)

    return rule


def _fold(x: Tensor, dim: int | None, heads: int, size: int) -> Tensor:
    """Join the mapped dimension with the heads; a tensor that is not mapped is repeated `size` times."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, heads - 1).flatten(heads - 1, heads)


def _unfold(x: Tensor, heads: int, size: int) -> Tensor:
    """Split the mapped dimension from the heads, as the first dimension."""
    return x.unflatten(heads, (size, x.shape[heads] // size)).movedim(heads - 1, 0)


def _name(operator: Any) -> str:
    return operator.name().split("::")[1]
