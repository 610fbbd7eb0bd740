"""`LightningForCausalLM` in vLLM: our layers, with linear layers and softmax attention of vLLM.

The names of modules and weights are those of `lightning_attention.models`, so checkpoints are read as they are.
Under tensor parallelism every rank has a part of the heads and of the GLU. Shapes: T tokens of all requests, W width.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.sequence import IntermediateTensors

from ...models.mixers import LINEAR
from ...nn import GatedLightningAttention, SoftmaxAttention, TokenMixer
from .states import States

SERVED = "lightning", "lightning-1"  # linear attentions; lightning-1 computes the same as lightning


class Part:
    """The part of a rank among `count`: equal slices of the first dimension of a tensor."""

    def __init__(self) -> None:
        self.rank, self.count = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()

    def size(self, name: str, total: int) -> int:
        if total % self.count:
            raise ValueError(f"tensor parallelism of {self.count} must divide {name} = {total}")
        return total // self.count

    def of(self, x: Tensor) -> Tensor:
        return x.chunk(self.count)[self.rank]

    def load(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """Load the part of a weight, as a `weight_loader` of vLLM."""
        parameter.data.copy_(self.of(weight))


class PartialNorm(nn.Module):
    """A norm over all heads, on the heads of a rank: the sums are those of all ranks.

    Args:
        norm: the norm, of the width of a rank.
        size: width of all ranks.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, norm: nn.Module, size: int, eps: float, part: Part):
        super().__init__()
        self.size, self.eps = size, eps
        self.is_centered = isinstance(norm, nn.LayerNorm)
        for name in ("weight", "bias"):
            parameter = getattr(norm, name, None)
            self.register_parameter(name, parameter)
            if parameter is not None:
                set_weight_attrs(parameter, {"weight_loader": part.load})

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        if self.is_centered:
            y = y - self._mean(y)
        y = (y * torch.rsqrt(self._mean(y.square()) + self.eps)).to(x.dtype)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def _mean(self, y: Tensor) -> Tensor:
        return tensor_model_parallel_all_reduce(y.sum(dim=-1, keepdim=True)) / self.size


class LightningMixer(GatedLightningAttention):
    """Lightning attention of the heads of a rank, from states in vLLM's cache."""

    def __init__(self, vllm_config: VllmConfig, layer_idx: int, prefix: str):
        config: Any = vllm_config.model_config.hf_config
        part = Part()
        log_decay, lrpe = part.of(config.layer_log_decay(layer_idx)), config.layer_has_lrpe(layer_idx)
        super().__init__(
            config.hidden_size // part.count,
            part.size("num_attention_heads", config.num_attention_heads),
            log_decay,
            lrpe=lrpe,
            eps=config.norm_eps,
            activation=config.qk_activation,
            norm=config.norm,
            gate=config.output_gate,
        )
        if self.lrpe is not None:
            set_weight_attrs(self.lrpe.theta, {"weight_loader": part.load})
        names = ["cos", "sin"] if lrpe else ["all"]
        self.states = nn.ModuleList([States(log_decay, self.head_dim, f"{prefix}.states.{name}") for name in names])
        _parallelize(self, vllm_config, part, prefix)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Any, state: Any, slots: Any) -> tuple[Tensor, None]:
        """The sum over the halves of LRPE's channels, each with states of its own."""
        halves = zip(self.states, q[0].chunk(len(self.states), -1), k[0].chunk(len(self.states), -1), strict=True)
        first, *others = [states(q, k, v[0]) for states, q, k in halves]
        for other in others:
            first = first + other
        return first[None], None


class SoftmaxMixer(SoftmaxAttention):
    """Softmax attention of the heads of a rank, from keys and values in vLLM's cache."""

    def __init__(self, vllm_config: VllmConfig, layer_idx: int, prefix: str):
        config: Any = vllm_config.model_config.hf_config
        part = Part()
        with torch.device("meta"):
            whole = config.make_mixer(layer_idx)
        super().__init__(
            config.hidden_size // part.count,
            part.size("num_attention_heads", whole.num_heads),
            num_key_value_heads=part.size("num_key_value_heads", whole.num_key_value_heads),
            rope=whole.rope,
            window=whole.window,
            eps=config.norm_eps,
            norm=None if isinstance(whole.norm, nn.Identity) else config.norm,
            gate=whole.gate,
        )
        self.kernel = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_key_value_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            per_layer_sliding_window=whole.window,
            prefix=f"{prefix}.kernel",
        )
        _parallelize(self, vllm_config, part, prefix)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Any, state: Any, slots: Any) -> tuple[Tensor, None]:
        return self.kernel(*(x[0].flatten(-2) for x in (q, k, v))).view_as(q), None


def _parallelize(mixer: TokenMixer, vllm_config: VllmConfig, part: Part, prefix: str) -> None:
    """Give a mixer made for the heads of a rank the linear layers and the norm of all heads."""
    config: Any = vllm_config.model_config.hf_config
    width, widths = config.hidden_size, [width * part.count for width in mixer.widths]
    mixer.qkvu_proj = _columns(width, widths, vllm_config, f"{prefix}.qkvu_proj")
    mixer.out_proj = _rows(width, width, vllm_config, f"{prefix}.out_proj")
    if part.count > 1 and not isinstance(mixer.norm, nn.Identity):
        mixer.norm = PartialNorm(mixer.norm, width, config.norm_eps, part)


def _make_glu(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    config: Any = vllm_config.model_config.hf_config
    width, inner = config.hidden_size, config.intermediate_size
    Part().size("intermediate_size", inner)
    with torch.device("meta"):
        glu = config.make_glu()
    glu.vu_proj = _columns(width, [inner, inner], vllm_config, f"{prefix}.vu_proj")
    glu.out_proj = _rows(inner, width, vllm_config, f"{prefix}.out_proj")
    return glu


def _columns(width: int, widths: list[int], vllm_config: VllmConfig, prefix: str) -> Any:
    """Linear layers side by side, of each of which a rank has a part of the outputs."""
    quant = vllm_config.quant_config
    return MergedColumnParallelLinear(width, widths, bias=False, quant_config=quant, return_bias=False, prefix=prefix)


def _rows(width: int, out_width: int, vllm_config: VllmConfig, prefix: str) -> Any:
    """A linear layer, of which a rank has a part of the inputs, and adds the results of all."""
    quant = vllm_config.quant_config
    return RowParallelLinear(width, out_width, bias=False, quant_config=quant, return_bias=False, prefix=prefix)


class DecoderLayer(nn.Module):
    """A layer as `LightningDecoderLayer`."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        layer_idx = extract_layer_index(prefix)
        self.attention_norm, self.mlp_norm = config.make_norm(), config.make_norm()
        mixer = LightningMixer if config.layer_types[layer_idx] == LINEAR else SoftmaxMixer
        self.attention = mixer(vllm_config, layer_idx, f"{prefix}.attention")
        self.mlp = _make_glu(vllm_config, f"{prefix}.mlp")

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x)[None], positions[None])[0][0]
        return x + self.mlp(self.mlp_norm(x))


@support_torch_compile
class LightningModel(nn.Module):
    """Embedding, the layers of this rank of pipeline parallelism, and the final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.embedding_scale = config.embedding_scale
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers, lambda prefix: DecoderLayer(vllm_config, prefix), prefix=f"{prefix}.layers"
        )
        self.norm = config.make_norm() if get_pp_group().is_last_rank else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        x: Any
        if intermediate_tensors is not None:
            x = intermediate_tensors["hidden_states"]
        else:
            x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            x = x * self.embedding_scale
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x = layer(x, positions)
        return self.norm(x) if get_pp_group().is_last_rank else IntermediateTensors({"hidden_states": x})


class LightningForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsPP, SupportsMambaPrefixCaching):
    """Causal language model.

    A model without softmax attention is a hybrid to vLLM too: it tells no others how many drafts were accepted.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        check_served(vllm_config)
        self.model = LightningModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head: Any = PPMissingLayer()
        if get_pp_group().is_last_rank:
            name = maybe_prefix(prefix, "lm_head")
            quant = vllm_config.quant_config
            self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, quant_config=quant, prefix=name)
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        config = vllm_config.model_config.hf_config
        head_dim = config.hidden_size // config.num_attention_heads
        heads = config.num_attention_heads // vllm_config.parallel_config.tensor_parallel_size
        return ((heads, head_dim, head_dim),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)


def check_served(vllm_config: VllmConfig) -> None:
    """Refuse models and options that would be served wrong, or not as asked."""
    config: Any = vllm_config.model_config.hf_config
    if LINEAR in (config.layer_types or []) and config.linear_attention not in SERVED:
        raise ValueError(f"vLLM serves lightning attention, not {config.linear_attention}: use model.generate()")
    if config.invariant:
        raise ValueError("vLLM makes no promise of invariant=True: serve with our engine, or with invariant=False")
    if config.positions == "learned":
        raise ValueError("vLLM serves no learned positions: use model.generate()")
    for name in ("mamba_cache_dtype", "mamba_ssm_cache_dtype"):
        if (dtype := getattr(vllm_config.cache_config, name)) not in ("auto", "float32"):
            raise ValueError(f"states are float32: leave {name} out, got {dtype}")
    if vllm_config.cache_config.use_replayssm:
        raise ValueError("use_replayssm is for Mamba: leave it out")
