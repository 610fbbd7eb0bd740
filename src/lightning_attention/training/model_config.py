"""Configuration of the model that a run trains from scratch, and its size in words."""

import json
from typing import Any, cast

from transformers import PreTrainedTokenizerFast

from ..models import LightningConfig, LightningForCausalLM
from ..models.checkpoint import UNUSABLE
from ..models.mixers import ATTENTIONS, attention_options
from ..models.tokenization import vocab_size
from .options import TrainingOptions


def model_config(options: TrainingOptions, tokenizer: PreTrainedTokenizerFast) -> LightningConfig:
    """Configuration by the options, with the vocabulary and the special tokens of the tokenizer.

    Raises:
        ValueError: an option or the file of a configuration is invalid.
    """
    changes: dict[str, Any] = {
        "vocab_size": vocab_size(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if options.decay_preset is not None:
        changes |= {"decay_preset": options.decay_preset, "log_decay": None}
    defaults: dict[str, Any] = {}
    if options.attention is not None:
        # In place of all that a file says of it.
        changes |= {"linear_attention": "lightning", "layer_pattern": None, "layer_types": None, "sliding_window": None}
        changes |= attention_options(options.attention)
        if options.attention in ATTENTIONS and not ATTENTIONS[options.attention].has_decay:
            defaults["max_position_embeddings"] = options.sequence_length
    if options.config is None:
        config = LightningConfig.from_size(options.size, **defaults, **changes)
    else:
        config = _config_from_file(options, defaults, changes)
    if options.decay_preset is not None and not config.has_decay:
        raise ValueError(f"decay_preset goes with lightning attention, which this model has not: {config.layer_types}")
    return config


def _config_from_file(options: TrainingOptions, defaults: dict[str, Any], changes: dict[str, Any]) -> LightningConfig:
    assert options.config is not None
    try:
        if options.config.exists() and not options.config.is_file():
            raise ValueError("it is not a file")
        given = json.loads(options.config.read_text(encoding="utf-8"))
        if not isinstance(given, dict):
            raise ValueError("it is not a JSON object")
        if given.get("model_type", LightningConfig.model_type) != LightningConfig.model_type:
            raise ValueError(f"its model_type is {given['model_type']!r}, not {LightningConfig.model_type!r}")
        if unknown := sorted(set(given) - set(LightningConfig().to_dict())):
            raise ValueError(f"unknown option {', '.join(unknown)}")
        config = LightningConfig.from_dict(defaults | given | changes)
        if config.output_attentions:
            raise ValueError("output_attentions must be false: this model computes no attention weights")
        config.check_length(options.sequence_length)
        return config
    except UNUSABLE as error:
        raise ValueError(f"{options.config} is not a model configuration: {error}") from error


def describe_size(model: LightningForCausalLM, options: TrainingOptions) -> str:
    """Name of the size of a model, if it has one, and its number of parameters."""
    size = "" if _size(options) is None else f"size {options.size}, "
    return f"{size}{in_millions(model.num_parameters())} parameters"


def explain_size(model: LightningForCausalLM, options: TrainingOptions) -> str:
    """Say how many parameters a model has, how many are embeddings of tokens, and what the name of its size counts.

    Example:
        >>> from lightning_attention.models import LightningConfig, LightningForCausalLM
        >>> from lightning_attention.training import TrainingOptions
        >>> from lightning_attention.training.model_config import explain_size
        >>> model = LightningForCausalLM(LightningConfig.from_size("45M", vocab_size=259))
        >>> explain_size(model, TrainingOptions("run", size="45M")).partition("; ")[0]
        'size 45M: 21.0M parameters, 133K of them embeddings of 259 tokens'
    """
    tables = (cast(Any, table).weight for table in (model.get_input_embeddings(), model.get_output_embeddings()))
    embeddings = sum(weight.numel() for weight in {id(weight): weight for weight in tables}.values())
    total, vocabulary, usual = model.num_parameters(), model.config.vocab_size, LightningConfig.vocab_size
    name = _size(options)
    line = f"{'model' if name is None else f'size {name}'}: {in_millions(total)} parameters, {in_millions(embeddings)} "
    line += f"of them embeddings of {vocabulary:,} tokens"
    if name is None or not name[0].isdigit() or vocabulary >= usual:
        return line
    usual_total = in_millions(total + embeddings // vocabulary * (usual - vocabulary))
    return f"{line}; the name is of papers with larger vocabularies: with {usual:,} tokens it has {usual_total}"


def in_millions(count: int) -> str:
    """Format a number of parameters in thousands, millions or billions, to three digits.

    Example:
        >>> from lightning_attention.training.model_config import in_millions
        >>> in_millions(20_997_000), in_millions(6_930_000_000)
        ('21.0M', '6.93B')
    """
    scale, unit = next((x for x in ((1e9, "B"), (1e6, "M")) if count >= 0.9995 * x[0]), (1e3, "K"))
    return f"{count / scale:#.3g}".rstrip(".") + unit


def _size(options: TrainingOptions) -> str | None:
    return options.size if options.config is None and options.init_from is None else None
