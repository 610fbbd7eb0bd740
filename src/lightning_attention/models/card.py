"""Model cards: the README.md of a checkpoint, for people and for the Hugging Face Hub.

A card says what the files of the checkpoint say, and nothing else. Texts that name the checkpoint are those of a local
folder until it is pushed, see `named`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..paths import PathLike, to_path
from .checkpoint import ADAPTER_CONFIG, RUN, TRAINER_STATE, UNUSABLE, last_checkpoint
from .configuration import LightningConfig
from .mixers import FULL, LINEAR, SLIDING
from .tokenization import well_formed
from .usage import usage

README = "README.md"
TAGS = ("lightning-attention", "linear-attention")
TASK = "text-generation"
LOCAL_NAME = "model"  # of results in the metadata, in a folder
SHOWN = 10  # names of files and folders in a card, at most


def write_card(folder: PathLike, trained: PathLike | None = None) -> None:
    """Write the card of a checkpoint to its README.md, unless there is one.

    Args:
        folder: the checkpoint.
        trained: see `model_card`.

    Raises:
        ValueError, OSError: see `model_card`; or the file cannot be written.
    """
    file = to_path(folder, "folder") / README
    if not file.exists():
        file.write_text(str(model_card(folder, trained)), encoding="utf-8")


def model_card(checkpoint: PathLike, trained: PathLike | None = None) -> ModelCard:
    """Make the card of a checkpoint: size, configuration, data, losses, and how to load it.

    Paths of the machine are not in it: files and folders of data are named without their parents.

    Args:
        checkpoint: folder of a model or of LoRA adapters, or output folder of a run, for its last checkpoint.
        trained: checkpoint of the adapters that were merged into the model; None for `checkpoint` itself.

    Raises:
        TypeError: an argument is not a path.
        ValueError: there is no checkpoint, or its files are damaged.

    Example:
        >>> from lightning_attention.models.card import model_card
        >>> model_card("run").data.pipeline_tag
        'text-generation'
    """
    folder = last_checkpoint(checkpoint)
    source = folder if trained is None else to_path(trained, "trained")
    try:
        config = LightningConfig.from_pretrained(folder)
        run, state = _read(source / RUN), _read(source / TRAINER_STATE)
        adapters = _read(folder / ADAPTER_CONFIG)
        merged = {} if trained is None else _read(source / ADAPTER_CONFIG)
        parts = [
            f"# {title(config)}",
            _summary(config, run, adapters, merged),
            _table("Model", _model_rows(config, run)),
            _table("Training", _training_rows(run, state)),
            _losses(run, state, is_merged=bool(merged)),
            usage(None, run.get("hub_base_model"), has_adapters=bool(adapters)),
        ]
        data = _metadata(run, state, adapters)
    except UNUSABLE as error:
        raise ValueError(f"no model card can be made of {folder}: {error}") from error
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n")


def named(card: ModelCard, checkpoint: Path, name: str, base_model: str | None = None) -> None:
    """Change a card of a folder into the card of a repository, in place; texts that a user has changed stay.

    Args:
        card: card of the checkpoint.
        checkpoint: the checkpoint.
        name: name of the repository on the Hub.
        base_model: name on the Hub of the model that was fine-tuned, or that adapters are for.
    """
    config, has_adapters = LightningConfig.from_pretrained(checkpoint), (checkpoint / ADAPTER_CONFIG).is_file()
    run = _read(checkpoint / RUN)
    local_base = run.get("hub_base_model")
    base = base_model or local_base
    texts = {f"# {title(config)}\n": f"# {name}\n"}
    texts[usage(None, local_base, has_adapters)] = usage(name, base, has_adapters)
    if base_model is not None and run.get("init_from"):
        texts[_code([_base_name(run["init_from"])])] = _code([base_model])
    for before, after in texts.items():
        card.text = card.text.replace(before, after, 1)
    data = metadata(card)
    if data.eval_results and data.model_name == LOCAL_NAME:
        data.model_name = name.rpartition("/")[2]
    if base_model is not None:
        data.base_model = base_model
        if has_adapters:
            others = [tag for tag in data.tags or () if not tag.startswith("base_model:adapter:")]
            data.tags = [*others, f"base_model:adapter:{base_model}"]


def metadata(card: ModelCard) -> ModelCardData:
    """Metadata of a card, which huggingface_hub types as those of any card."""
    return cast(ModelCardData, card.data)


def title(config: LightningConfig) -> str:
    """Title of the card of a model without a name."""
    return f"Language model with {_attentions(config)[0]} attention"


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file, as in folders that no run has written."""
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return content


def _metadata(run: Mapping[str, Any], state: Mapping[str, Any], adapters: Mapping[str, Any]) -> ModelCardData:
    """Metadata as the Hub reads them, for adapters by the conventions of PEFT."""
    base: str | None = run.get("hub_base_model")
    tags: list[str] = [*TAGS]
    if adapters:
        tags += ["lora", "transformers"] + ([f"base_model:adapter:{base}"] if base else [])
    results = [
        EvalResult(TASK, "held-out", _held_out_name(run), metric, round(value, 4), metric_name=words)
        for metric, words, value in _held_out(state)
    ]
    return ModelCardData(
        library_name="peft" if adapters else "transformers",
        pipeline_tag=TASK,
        tags=tags,
        license=run.get("license"),
        base_model=base,
        eval_results=results or None,
        model_name=LOCAL_NAME if results else None,
    )


def _summary(
    config: LightningConfig, run: Mapping[str, Any], adapters: Mapping[str, Any], merged: Mapping[str, Any]
) -> str:
    what = f"A causal language model with {_attentions(config)[0]} attention"
    base = run.get("hub_base_model") or (_base_name(run["init_from"]) if run.get("init_from") else "another checkpoint")
    if adapters:
        what = f"LoRA adapters of rank {adapters.get('r')} for {_code([base])}, a{what[1:]}"
    elif merged:
        what += f": {_code([base])} with LoRA adapters of rank {merged.get('r')}, merged into its weights"
    elif run.get("init_from"):
        what += f", fine-tuned from {_code([base])}"
    return f"{what}. Made with the library lightning-attention."


def _model_rows(config: LightningConfig, run: Mapping[str, Any]) -> dict[str, str]:
    heads = str(config.num_attention_heads)
    if config.num_key_value_heads != config.num_attention_heads:
        heads += f", {config.num_key_value_heads} of keys and values in softmax attention"
    return {
        "parameters": f"{run.get('num_parameters') or _num_parameters(config):,}",
        "trained parameters": f"{run['num_trained']:,}" if run.get("lora_rank") and run.get("num_trained") else "",
        "layers": str(config.num_hidden_layers),
        "width": f"{config.hidden_size:,}",
        "width of the GLU": f"{config.intermediate_size:,}",
        "heads": heads,
        "attention": ", ".join(_attentions(config)[1]),
        "decays": ("own" if config.log_decay is not None else config.decay_preset) if config.has_decay else "",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "context length": "not limited" if config.position_limit is None else f"{config.position_limit:,} tokens",
    }


def _training_rows(run: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, str]:
    if not run:
        return {}
    corpus, validation = run.get("corpus") or {}, run.get("validation_corpus") or {}
    size = f": {_count(corpus['documents'], 'document')}, {corpus['train']:,} tokens for training" if corpus else ""
    held_out = f"{corpus['held_out']:,} tokens at the end of the data" if corpus.get("held_out") else ""
    if validation:
        held_out = f"{_names(run, 'validation')}: {validation['held_out']:,} tokens"
    sequences, length = run.get("sequences_per_step", 0), run.get("sequence_length", 0)
    return {
        "data": _names(run, "data") + size,
        "held-out text": held_out,
        "tokenizer": "UTF-8 bytes" if run.get("tokenizer") == "bytes" and not run.get("init_from") else "",
        "tokens read": f"{state['num_input_tokens_seen']:,}" if state.get("num_input_tokens_seen") else "",
        "steps": f"{state['global_step']:,} of {sequences:,} sequences of {length:,} tokens" if state else "",
        "learning rate": f"{run['learning_rate']:g} at most, {run.get('schedule', 'cosine')}",
    }


def _losses(run: Mapping[str, Any], state: Mapping[str, Any], is_merged: bool) -> str:
    """Section of the losses that were measured at the step of the checkpoint."""
    lines = []
    if training := _last(state, "loss"):
        lines.append(f"| training text, mean of at most {run.get('log_every', 1)} steps | {training:.4f} | |")
    if held_out := {metric: value for metric, _, value in _held_out(state)}:
        bits = f"{held_out['bits_per_byte']:.4f}" if "bits_per_byte" in held_out else ""
        count = f", {run['num_evaluated']:,} tokens" if run.get("num_evaluated") else ""
        lines.append(f"| held-out text{count} | {held_out['loss']:.4f} | {bits} |")
    if not lines:
        return ""
    head = "| losses | nats per token | bits per byte |\n|---|---|---|\n"
    note = "\n\nMeasured with the adapters beside the weights, before they were merged." if is_merged else ""
    return "## Losses\n\n" + head + "\n".join(lines) + note


def _held_out(state: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Metrics of held-out text after the step of the checkpoint: type, name and value."""
    found = [
        ("loss", "nats per token", _last(state, "eval_loss")),
        ("bits_per_byte", "bits per byte", _last(state, "eval_bits_per_byte")),
    ]
    return [(metric, words, value) for metric, words, value in found if value is not None]


def _last(state: Mapping[str, Any], name: str) -> float | None:
    """Last value that was logged at the step of the checkpoint."""
    step = state.get("global_step")
    found = [x[name] for x in state.get("log_history", ()) if x.get("step") == step and x.get(name) is not None]
    return float(found[-1]) if found else None


def _held_out_name(run: Mapping[str, Any]) -> str:
    names = run.get("validation") or ()
    return ", ".join(_plain_names(names)) if names else f"end of {', '.join(_plain_names(run.get('data') or ()))}"


def _names(run: Mapping[str, Any], option: str) -> str:
    return _code(_plain_names(run.get(option) or ())) if run.get(option) else _plain_names(())[0]


def _plain_names(paths: Iterable[str]) -> list[str]:
    """Names of files and folders without their parents."""
    found = (Path(path) if Path(path).name not in ("", "..") else Path(path).resolve() for path in paths)
    names = list(dict.fromkeys(_printable(path.name or "/") for path in found))
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [*names[:SHOWN], *more] or ["Python's standard library"]


def _base_name(checkpoint: str) -> str:
    """Name of a checkpoint without the folders around it, but with that of its run."""
    path = Path(checkpoint)
    return _printable("/".join(path.parts[-2:]) if path.name.startswith("checkpoint-") else path.name)


def _printable(name: str) -> str:
    return "".join(x if x.isprintable() else "\ufffd" for x in well_formed(name))


def _code(names: Iterable[str]) -> str:
    """Names as code in a table of Markdown."""
    return ", ".join("`" + name.replace("`", "'").replace("|", "\\|") + "`" for name in names)


def _attentions(config: LightningConfig) -> tuple[str, list[str]]:
    """The main attention, and the number of layers of each."""
    names = {LINEAR: config.linear_attention, FULL: "softmax", SLIDING: f"softmax over {config.sliding_window} tokens"}
    counts = Counter(config.layer_types)
    main = config.linear_attention if LINEAR in counts else "softmax"
    return main, [f"{names[kind]} in {_count(count, 'layer')}" for kind, count in counts.items()]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _num_parameters(config: LightningConfig) -> int:
    from .heads import LightningForCausalLM

    with torch.device("meta"):
        return LightningForCausalLM(config).num_parameters()


def _table(heading: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return f"## {heading}\n\n| | |\n|---|---|\n" + "\n".join(lines) if lines else ""
