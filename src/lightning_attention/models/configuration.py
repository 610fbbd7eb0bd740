"""Configuration of the language models."""

import copy
from dataclasses import fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, logging

from ..nn import SimpleGLU, TokenMixer, make_norm
from ..nn.activations import ACTIVATIONS
from ..nn.glu import GLU_ACTIVATIONS
from ..nn.norms import NORMS
from ..nn.sizes import check_bool, check_choice
from ..ops.decay import LAYERLESS_PRESETS, PRESETS, log_decay
from ..paths import PathLike, to_path
from .mixers import (
    ATTENTIONS,
    DECAY_POSITIONS,
    FULL,
    LAYER_TYPES,
    LINEAR,
    SLIDING,
    SOFTMAX,
    SOFTMAX_POSITIONS,
    LinearAttention,
    check_is_invariant,
    layer_types,
    make_softmax,
)
from .remote_code import is_ours, with_auto_map, write_remote_code
from .rotary import rope_parameters
from .values import check_int, check_not_negative, check_token_id, lists_of_numbers

logger = logging.get_logger(__name__)

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SIZE_OPTIONS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Options that are not fields, and that transformers takes or writes.
TRANSFORMERS_OPTIONS = frozenset({
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_experts_implementation_internal",
    "_name_or_path", "attn_implementation", "auto_map", "experts_implementation", "loss_type", "model_type",
    "name_or_path", "num_labels", "output_attentions", "quantization_config", "tokenizer_class", "torch_dtype",
})  # fmt: skip
# Options of `from_pretrained` that say where and how to load; some of them are passed on to `from_dict`.
LOADER_OPTIONS = frozenset({
    "cache_dir", "code_revision", "dtype", "force_download", "gguf_file", "local_files_only", "proxies", "revision",
    "subfolder", "token", "torch_dtype", "trust_remote_code",
})  # fmt: skip

# TransNormerLLM (arXiv 2307.14995, 2401.04658). The papers give the GLU width of 385M and 1B, 2.75 times the width;
# the larger sizes keep the ratio. Names are the papers', which count "385M" with a vocabulary of 50272 tokens: it has
# 399M parameters with the default of 64000. "45M" has 21M with a vocabulary of bytes.
SIZES: dict[str, dict[str, int]] = {
    "demo": {"num_hidden_layers": 4, "hidden_size": 192, "num_attention_heads": 4, "intermediate_size": 512},
    "45M": {"num_hidden_layers": 6, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1408},
    "385M": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 2816},
    "1B": {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 5632},
    "3B": {"num_hidden_layers": 32, "hidden_size": 2560, "num_attention_heads": 20, "intermediate_size": 7040},
    "7B": {"num_hidden_layers": 30, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11264},
    "15B": {"num_hidden_layers": 42, "hidden_size": 5120, "num_attention_heads": 40, "intermediate_size": 14080},
}

# Options of the blocks of TransNormerLLM and of LLaMA, where they are not given.
BLOCKS: dict[str, dict[str, Any]] = {
    "transnormer": {"norm": "simple_rms", "output_gate": True, "glu_activation": "none"},
    "llama": {"norm": "rms", "output_gate": False, "glu_activation": "silu"},
}


class LightningConfig(PreTrainedConfig):
    """Configuration of a TransNormerLLM.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the model, a multiple of `num_attention_heads`.
        intermediate_size: width of the GLU.
        num_hidden_layers: number of layers L.
        num_attention_heads: number of heads H.
        linear_attention: "lightning"; "lightning-1", the same in quadratic time; an attention of a feature map with a
            denominator, without decay: "elu", "cosformer", "rfa" or "performer", see `nn.feature_maps`; or one of your
            own, see `register_attention`.
        layer_types: of every layer "linear_attention", "full_attention" or "sliding_attention", the last two being
            softmax attention; None is "linear_attention" for all.
        layer_pattern: the same as two numbers: "7:1" is seven layers of linear attention, one of full attention, and
            again from the start.
        sliding_window: tokens that a token of "sliding_attention" attends to, itself included.
        num_key_value_heads: of softmax attention, a divisor of `num_attention_heads`; None is as many.
        rope_parameters: of softmax attention, by transformers' names: `rope_theta`, the base, 10000 by default, and
            `rope_type`, "default", or "linear" for Position Interpolation with its `factor`. None is the default where
            positions are rotary.
        positions: for "lightning" and "lightning-1" "mix", LRPE-d in the first layer and decay alone in the others;
            "lrpe-d", LRPE-d in every layer; or "decay", decay alone in every layer. For others "learned", embeddings
            added to those of tokens, or "none", which is the only choice for cosFormer, whose features hold positions.
            None is "mix", "none" for cosFormer, and "learned" for others. Softmax attention has rotary positions beside
            lightning attention. Alone it has "rope", the default, "learned" or "none".
        decay_preset: name of the decays of all heads and layers, see `decay.log_decay`. A trained model must keep its
            preset.
        log_decay: L lists or tensors of H numbers <= 0, natural logarithm of the decay per token; replaces the preset.
        block: "transnormer"; or "llama", whose embeddings are not scaled, and whose softmax attention has no norm of
            its output. It also chooses the next three options where they are None.
        norm: every norm: "simple_rms", without a weight; "rms", with one, for "llama"; or "layer", with weight and
            bias.
        norm_eps: added to the mean square in every norm.
        output_gate: whether the output of attention is gated; for "llama" it is not.
        qk_activation: of queries and keys of lightning attention: "silu", "1+elu" or "none".
        glu_activation: of the GLU: "none", or for "llama" "silu", SwiGLU.
        initializer_range: standard deviation of new weights.
        use_cache: whether a forward pass returns its cache by default.
        max_position_embeddings: longest context length that tools such as lm-eval should use; None is no limit. Learned
            positions and cosFormer need it: it is their longest context. Other models have no limit and do not read it.
        num_features: features of a head for "rfa" and "performer"; None is their default for the head size.
        feature_seed: seed of their random features; every layer has its own.
        invariant: whether logits of a token have the same bits whatever else is in the batch, see `docs/model.md`.
        bos_token_id, eos_token_id, pad_token_id: special tokens in `[0, vocab_size)`, or None.

    Raises:
        TypeError: an option is unknown, or a value has the wrong type.
        ValueError: a value is out of range or does not fit the others.

    Example:
        >>> from lightning_attention.models import LightningConfig
        >>> LightningConfig.from_size("385M", vocab_size=50272).num_hidden_layers
        24
    """

    model_type: ClassVar[str] = "lightning"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values", "states"]

    vocab_size: int = 64000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    linear_attention: str = "lightning"
    positions: str | None = None
    decay_preset: str = "transnormer"
    log_decay: list[list[float]] | None = None
    block: str = "transnormer"
    norm: str | None = None
    norm_eps: float = 1e-6
    output_gate: bool | None = None
    qk_activation: str = "silu"
    glu_activation: str | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    layer_types: list[str] | None = None
    layer_pattern: str | None = None
    sliding_window: int | None = None
    num_key_value_heads: int | None = None
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int | None = None
    num_features: int | None = None
    feature_seed: int = 0
    invariant: bool = False

    def __post_init__(self, **kwargs: Any):
        if unknown := sorted(set(kwargs) - TRANSFORMERS_OPTIONS):
            raise TypeError(f"{type(self).__name__} has no option {', '.join(unknown)}")
        for name in SIZE_OPTIONS:
            check_int(name, getattr(self, name), at_least=1)
        if self.max_position_embeddings is not None:
            check_int("max_position_embeddings", self.max_position_embeddings, at_least=1)
        for name in ("norm_eps", "initializer_range"):
            check_not_negative(name, getattr(self, name))
        if self.hidden_size % (heads := self.num_attention_heads):
            raise ValueError(f"hidden_size must be a multiple of num_attention_heads = {heads}, got {self.hidden_size}")
        check_choice("block", self.block, BLOCKS)
        for name, value in BLOCKS[self.block].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name, known in (("norm", NORMS), ("qk_activation", ACTIVATIONS), ("glu_activation", GLU_ACTIVATIONS)):
            check_choice(name, getattr(self, name), known)
        for name in ("output_gate", "tie_word_embeddings", "use_cache", "invariant"):
            check_bool(name, getattr(self, name))
        for name, dtype in (("dtype", self.dtype), ("torch_dtype", kwargs.get("torch_dtype"))):
            if isinstance(dtype, str):
                if not isinstance(getattr(torch, dtype, None), torch.dtype):
                    raise ValueError(f"{name} must be the name of a dtype of torch, got {dtype!r}")
            elif dtype is not None and not isinstance(dtype, torch.dtype):
                raise TypeError(f"{name} must be a dtype of torch or its name, got {dtype!r}")
        self._check_layer_types()
        self._check_attention()
        if self.invariant:
            check_is_invariant(self)
        self.rope_parameters = rope = self.checked_rope()
        if self.decay_preset not in PRESETS:
            raise ValueError(f"decay_preset must be one of {', '.join(PRESETS)}, got {self.decay_preset!r}")
        if self.log_decay is not None:
            self.log_decay = lists_of_numbers("log_decay", self.log_decay)
            shape = [len(self.log_decay), *{len(layer) for layer in self.log_decay}]
            if shape != [self.num_hidden_layers, self.num_attention_heads]:
                raise ValueError(
                    f"log_decay must be {self.num_hidden_layers} lists of {self.num_attention_heads} numbers"
                )
            if not all(log_decay <= 0 for layer in self.log_decay for log_decay in layer):
                raise ValueError("log_decay must be <= 0")
        if self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder must be False: this is a decoder")
        self.check_token_ids(self.vocab_size)
        if is_ours(type(self)):
            kwargs["auto_map"] = with_auto_map(kwargs.get("auto_map"))
        super().__post_init__(**kwargs)
        self.rope_parameters = rope  # transformers sets them for models without rotary positions too

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; refuse a special token out of range, which other software may set before training."""
        is_made = "_name_or_path" in vars(self)  # the last that the constructor sets
        if name in TOKEN_IDS and is_made:
            check_token_id(name, value, self.vocab_size)
        super().__setattr__(name, value)
        if name == "num_hidden_layers" and is_made and (self.layer_pattern is not None or not self.has_softmax):
            self.layer_types = None
            self._check_layer_types()

    def _check_layer_types(self) -> None:
        """Check the types of layers and the options of softmax attention; set the types by the pattern."""
        if self.layer_pattern is not None:
            types = layer_types(self.layer_pattern, self.num_hidden_layers)
            if self.layer_types is not None and list(self.layer_types) != types:
                raise ValueError(f"layer_pattern {self.layer_pattern!r} and layer_types differ: give one of them")
            self.layer_types = types
        if self.layer_types is None:
            self.layer_types = [LINEAR] * self.num_hidden_layers
        if not isinstance(self.layer_types, (list, tuple)):
            raise TypeError(f"layer_types must be a list, got {self.layer_types!r}")
        if len(self.layer_types) != self.num_hidden_layers or not all(kind in LAYER_TYPES for kind in self.layer_types):
            raise ValueError(
                f"layer_types must be {self.num_hidden_layers} of {', '.join(LAYER_TYPES)}, got {self.layer_types}"
            )
        if (SLIDING in self.layer_types) != (self.sliding_window is not None):
            raise ValueError(f"sliding_window goes with layers of {SLIDING}: give both or neither")
        if self.sliding_window is not None:
            check_int("sliding_window", self.sliding_window, at_least=1)
        if self.num_key_value_heads is None:  # tools multiply by it
            self.num_key_value_heads = self.num_attention_heads
        check_int("num_key_value_heads", self.num_key_value_heads, at_least=1)
        if not self.has_softmax and self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(f"num_key_value_heads goes with layers of {FULL} or {SLIDING}")
        if (heads := self.num_attention_heads) % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads = {heads}, got {self.num_key_value_heads}"
            )

    def checked_rope(self) -> dict[str, Any] | None:
        """Rotary positions of softmax attention as a dictionary of all values, or None without them.

        Raises:
            TypeError, ValueError: see `rope_parameters`, which other software may have set.
        """
        given, has_rope = self.rope_parameters, self.has_softmax and self.positions in ("rope", *DECAY_POSITIONS)
        if not has_rope:
            if given is not None:
                raise ValueError(f"rope_parameters go with softmax attention and rotary positions, got {given}")
            return None
        return rope_parameters(given, self.hidden_size // self.num_attention_heads)

    @property
    def has_softmax(self) -> bool:
        """True if a layer has softmax attention."""
        return any(kind != LINEAR for kind in self.layer_types or ())

    @property
    def has_decay(self) -> bool:
        """True if a layer has lightning attention."""
        return self._attention[1].has_decay

    @property
    def _attention(self) -> tuple[str, LinearAttention]:
        """Name of the linear attention, and what it is; of softmax attention if there are no other layers."""
        if LINEAR not in (self.layer_types or ()):
            return SOFTMAX, LinearAttention(make_softmax, SOFTMAX_POSITIONS, is_linear=False)
        return self.linear_attention, ATTENTIONS[self.linear_attention]

    def _check_attention(self) -> None:
        """Check the options of the attention, and that they go together; set the default positions."""
        if self.linear_attention not in ATTENTIONS:
            raise ValueError(f"linear_attention must be one of {', '.join(ATTENTIONS)}, got {self.linear_attention!r}")
        name, attention = self._attention
        if name == SOFTMAX and self.linear_attention != type(self).linear_attention:
            raise ValueError(f"linear_attention goes with layers of {LINEAR}, and there are none")
        if self.positions is None:
            self.positions = attention.positions[0]
        if self.positions not in attention.positions:
            known = ", ".join(attention.positions)
            raise ValueError(f"positions must be one of {known}, got {self.positions!r} for {name} attention")
        if not attention.has_decay and (self.log_decay is not None or self.decay_preset != type(self).decay_preset):
            raise ValueError(f"log_decay and decay_preset go with lightning attention, {name} has no decay")
        if not attention.has_decay and self.qk_activation != type(self).qk_activation:
            raise ValueError(f"qk_activation goes with lightning attention, not with {name}")
        if (attention.has_limit or self.positions == "learned") and self.max_position_embeddings is None:
            raise ValueError(
                f"max_position_embeddings is needed by {name} attention with positions {self.positions!r}: the "
                "longest context of the model"
            )
        check_int("feature_seed", self.feature_seed, at_least=0)
        if self.num_features is not None:
            check_int("num_features", self.num_features, at_least=1)
            if not attention.has_random_features:
                names = [other for other, known in ATTENTIONS.items() if known.has_random_features]
                raise ValueError(f"num_features goes with {' and '.join(names)}, not with {name}")

    def check_token_ids(self, vocab_size: int) -> None:
        """Check that special tokens are in a vocabulary of this size.

        Raises:
            TypeError: a token is not an integer.
            ValueError: a token is out of range.
        """
        for name in TOKEN_IDS:
            check_token_id(name, getattr(self, name), vocab_size)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from a dictionary and options that replace its values; used by `from_pretrained`.

        Raises:
            TypeError, ValueError: see the constructor; TypeError also for unknown options, unless
                `return_unused_kwargs` returns them.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        names = {field.name for field in fields(cls)}
        # What is no option, but the name of a method or property, transformers would replace.
        known = names | TRANSFORMERS_OPTIONS | LOADER_OPTIONS
        taken = {name: kwargs.pop(name) for name in list(kwargs) if name not in known and hasattr(cls, name)}
        options = names & set(kwargs) - {"dtype"}
        given = config_dict | {name: kwargs.pop(name) for name in options}
        # Saved types of layers may be those of another pattern or number of layers, and a saved pattern of other types.
        if "layer_types" in options:
            given |= {} if "layer_pattern" in options else {"layer_pattern": None}
        elif given.get("layer_pattern") is not None or set(given.get("layer_types") or ()) <= {LINEAR}:
            given.pop("layer_types", None)
        if "decay_preset" in options and "log_decay" not in options:
            given.pop("log_decay", None)
        if "num_key_value_heads" not in options and given.get("num_key_value_heads") == config_dict.get(
            "num_attention_heads"
        ):
            given.pop("num_key_value_heads", None)  # as many as there are heads
        saved, changed = config_dict.get("rope_parameters"), given.get("rope_parameters")
        if isinstance(saved, dict) and isinstance(changed, dict) and "rope_theta" in saved:
            given["rope_parameters"] = {"rope_theta": saved["rope_theta"]} | changed  # of the weights
        found: Any = super().from_dict(given, return_unused_kwargs=True, **kwargs)
        config, unused = found[0], found[1] | taken
        if return_unused:
            return config, unused
        if unknown := sorted(set(unused) - LOADER_OPTIONS):
            raise TypeError(f"{cls.__name__} has no option {', '.join(unknown)}")
        return config

    def to_json_file(self, json_file_path: PathLike, use_diff: bool = True) -> None:
        """Save as JSON; next to a `config.json`, also save the module that its `auto_map` names (see `remote_code`).

        Attributes that other software has set on this object are left out with a warning, because a configuration with
        unknown options could not be loaded.
        """
        path, config = to_path(json_file_path, "json_file_path"), self
        known = {field.name for field in fields(self)} | TRANSFORMERS_OPTIONS
        if foreign := [name for name in vars(self) if name not in known and not name.startswith("_")]:
            logger.warning(f"not saved, since LightningConfig has no such option: {', '.join(foreign)}")
            config = copy.copy(self)
            for name in foreign:
                delattr(config, name)
        super(LightningConfig, config).to_json_file(path, use_diff=use_diff)
        if path.name == CONFIG_NAME and is_ours(type(self)):
            write_remote_code(path.parent)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Save the source of a derived class with it; this class needs none, see `remote_code`."""
        if not is_ours(cls):
            super().register_for_auto_class(auto_class)

    @classmethod
    def from_size(cls, size: str, **options: Any) -> "LightningConfig":
        """Configuration of a size in `SIZES`, with other options added or replaced.

        Raises:
            ValueError: the size is unknown.
        """
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        sizes: dict[str, Any] = SIZES[size] | options
        return cls(**sizes)

    def layer_log_decay(self, layer_idx: int) -> Tensor:
        """Natural logarithm of one layer's decay per token, `[H]` float32 on the CPU."""
        if self.log_decay is not None:
            return torch.tensor(self.log_decay[layer_idx], dtype=torch.float32, device="cpu")
        layer = {} if self.decay_preset in LAYERLESS_PRESETS else {"layer_idx": layer_idx}
        return log_decay(self.num_attention_heads, num_layers=self.num_hidden_layers, preset=self.decay_preset, **layer)

    def layer_has_lrpe(self, layer_idx: int) -> bool:
        """True if the layer encodes positions by LRPE-d."""
        return self.positions == "lrpe-d" or (self.positions == "mix" and layer_idx == 0)

    @property
    def embedding_scale(self) -> float:
        """Factor on the input of the first layer."""
        return self.hidden_size**0.5 if self.block == "transnormer" else 1.0

    @property
    def position_limit(self) -> int | None:
        """Number of positions that the model has; None is no limit."""
        has_limit = self.positions == "learned" or self._attention[1].has_limit
        return self.max_position_embeddings if has_limit else None

    def check_length(self, length: int) -> None:
        """Check a context length.

        Raises:
            ValueError: the model has fewer positions.
        """
        if self.position_limit is not None and length > self.position_limit:
            raise ValueError(
                f"{length} tokens exceed the {self.position_limit} positions of this model (max_position_embeddings)"
            )

    def layer_state_shape(self, layer_idx: int) -> tuple[int, int, int]:
        """Shape `(H, K, V)` of a layer's state of one sequence, see `TokenMixer.state_shape`.

        Raises:
            ValueError: the layer has softmax attention, which has no state.
        """
        with torch.device("meta"):
            return self.make_mixer(layer_idx).state_shape

    def make_norm(self) -> nn.Module:
        """Create a norm over the width of the model."""
        return make_norm(cast(str, self.norm), self.hidden_size, self.norm_eps)

    def make_glu(self) -> SimpleGLU:
        """Create the GLU of a layer."""
        return SimpleGLU(self.hidden_size, self.intermediate_size, activation=cast(str, self.glu_activation))

    def make_mixer(self, layer_idx: int) -> TokenMixer:
        """Create the token mixer of a layer."""
        self._check_layer_types()  # other software may have set them
        is_linear = (self.layer_types or [])[layer_idx] == LINEAR
        mixer = ATTENTIONS[self.linear_attention].make(self, layer_idx) if is_linear else make_softmax(self, layer_idx)
        if mixer.gate != self.output_gate:
            raise ValueError(f"output_gate is {self.output_gate}, which {type(mixer).__name__} was not made with")
        mixer.invariant = self.invariant
        return mixer
