"""Decoder layers compiled in place."""

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..nn import KeyValues, SoftmaxAttention
from .model import LightningDecoderLayer

# Graphs of all layers together, which share code. A run needs one for each of: gradients or none; a first layer with
# LRPE-d and layers without; packed sequences, one batch row or several; states or none.
MAX_GRAPHS = 64


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile every decoder layer of a model in place, by `torch.compile`, at its first call.

    Layers keep their class and the names of their weights: save, load and generate as before. Equal layers share a
    graph, so compilation takes as long for 40 layers as for one. A graph serves every number of tokens, batch rows and
    packed sequences above 1; another one is compiled for one batch row, for one token, with states, with `cu_seqlens`,
    and without gradients.

    It sets `torch._dynamo.config.recompile_limit` to at least 64, and turns off `optimize_ddp` and
    `torch.fx.experimental._config.use_duck_shape`, in the process as a whole.

    Call it before `fully_shard`, `DistributedDataParallel` or transformers' `Trainer`, in place of its
    `torch_compile=True`, and after `set_sequence_parallel`: ranks communicate outside of the graphs.

    Args:
        model: any model of this library, or a module that holds one.
        backend: backend of `torch.compile`.

    Raises:
        TypeError: the model has no decoder layer of this library.
        ValueError: the model is invariant and on a CPU, where a compiled layer has other bits for other shapes.

    Example:
        >>> from lightning_attention.models import LightningConfig, LightningForCausalLM, compile_layers
        >>> model = LightningForCausalLM(LightningConfig.from_size("demo", vocab_size=256))
        >>> compile_layers(model)
    """
    layers = [module for module in model.modules() if isinstance(module, LightningDecoderLayer)]
    if not layers:
        raise TypeError(f"compile_layers takes a model with lightning attention layers, got {type(model).__name__}")
    if any(layer.attention.invariant and layer.attention.qkvu_proj.weight.is_cpu for layer in layers):
        raise ValueError("an invariant model cannot be compiled on a CPU: kernels depend on shapes")
    _configure_compiler()
    for layer in layers:
        # Packed sequences of softmax attention are grouped by the host where there is no kernel.
        is_one_graph = layer.attention.sequence_parallel is None and not isinstance(layer.attention, SoftmaxAttention)
        layer.compile(fullgraph=is_one_graph, backend=backend)
        layer._compiled_call_impl = _with_any_sizes(layer, cast(Callable[..., Any], layer._compiled_call_impl))


def _with_any_sizes(layer: LightningDecoderLayer, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled layer, with a graph for any number of batch rows, tokens and sequences.

    With keys and values of earlier tokens it is not compiled: their length would need a graph for each.

    `dynamic=True` would make every size a symbol: on a GPU that takes minutes to compile.
    """
    from torch._dynamo import maybe_mark_dynamic  # as slow to import as PyTorch

    def call(x: Tensor, positions: Tensor, cu_seqlens: Tensor | None, state: Any, *rest: Any) -> Any:
        if isinstance(state, KeyValues):
            return layer._call_impl(x, positions, cu_seqlens, state, *rest)
        for tensor, sizes in ((x, (0, 1)), (positions, (0, 1)), (cu_seqlens, 0), (state, 0)):
            if tensor is not None:
                maybe_mark_dynamic(tensor, sizes)
        return compiled(x, positions, cu_seqlens, state, *rest)

    return call


def _configure_compiler() -> None:
    """Set what `torch.compile` takes from global configuration alone."""
    import torch._dynamo  # as slow to import as PyTorch
    import torch.fx.experimental._config as symbols

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    # Equal sizes are else one symbol: a graph traced with as many tokens as channels would be for that many alone.
    symbols.use_duck_shape = False
    # DistributedDataParallel overlaps communication by layers; the compiler would cut layers into buckets.
    torch._dynamo.config.optimize_ddp = False


def compiler_error(device: torch.device) -> str | None:
    """Compile a small function for a device; return why that failed, in a line, or None.

    A missing C++ compiler, Python header or Triton would otherwise fail the first step.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # advice on TF32, given once, which is not about the function
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of many types, by the step that fails
        return f"torch.compile fails: {' '.join(str(error).split())[:200]}"
    return None
