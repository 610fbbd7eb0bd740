"""Options of a training run, and `run.json`, the file that keeps them."""

import json
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

from .. import files
from ..distributed.exchange import STRATEGIES
from ..models.checkpoint import RUN as FILE
from ..paths import PathLike, to_path, to_paths
from .pushing import OPTIONS as OF_THE_HUB
from .pushing import check_push
from .reporting import report_names

AT_LEAST_ONE = (
    "segment_length", "batch_size", "sequence_parallel", "accumulate", "steps", "eval_tokens", "log_every",
    "eval_every", "save_every", "lora_rank",
)  # fmt: skip
# Options that a checkpoint determines, see `init_from`.
OF_THE_MODEL = ("size", "config", "tokenizer", "eos_token", "attention", "decay_preset")
# Options that may change when a run resumes, in run.json or with --resume; in the table of docs/training.md.
MAY_CHANGE = {
    "output", "steps", "learning_rate", "schedule", "decay_steps", "min_lr", "segment_length", "batch_size",
    "sequence_parallel", "sequence_parallel_strategy", "fsdp", "accumulate", "eval_tokens", "log_every", "eval_every",
    "save_every", "keep_best", "report_to", "dtype", "fp8", "compile", "gradient_checkpointing", "timeout",
    *OF_THE_HUB,
}  # fmt: skip
SCHEDULES = ("cosine", "wsd", "constant")
DTYPES = ("auto", "float32", "bfloat16")
LIMIT = 1 << 53  # largest number: JSON readers keep integers up to here exactly, as floats


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a training run, kept in `run.json` of its output folder.

    Paths are `str` or `os.PathLike`, and kept as `Path`s.

    A step reads `batch_size * accumulate` sequences for each data process (a process, or a group of `sequence_parallel`
    processes). Epochs are shuffled by `seed` and joined end to end, so that all steps read equally many sequences. The
    sequences of a step and its loss, a mean over tokens, do not depend on the number of processes.

    Attributes:
        output: folder for checkpoints, tokens, metrics and plot; must not hold a run.
        data: text files and folders, or one of them; empty for Python's standard library.
        validation: text files and folders, or one of them, to evaluate on; nothing of `data` is held out then.
        text_field: field of a `.jsonl` line, or column of a `.parquet` file, with the text, or with the messages of a
            conversation; None for `text`, or `messages`.
        tokenizer: "bytes", the path of a tokenizer.json or of its folder, or a name on the Hugging Face Hub.
        chat_template: Jinja file that renders conversations, instead of the template of the tokenizer.
        eos_token: token of the vocabulary that ends a document; None for the tokenizer's own, see `load_tokenizer`.
        size: a name in `models.SIZES`.
        config: JSON file of `LightningConfig` options, instead of a size. The size of the vocabulary and the special
            tokens are the tokenizer's.
        attention: `linear_attention` of `LightningConfig`; "softmax", for every layer; or its `layer_pattern`. None for
            that of the configuration.
        decay_preset: see `decay.log_decay`; None for the preset of the configuration.
        init_from: checkpoint, or output folder of a run for its last checkpoint, whose weights, configuration and
            tokenizer the run starts from; the options of the model and the tokenizer must then be left out.
        lora_rank: train LoRA adapters of this rank on the linear layers, and no other weight; needs `init_from` and
            PEFT. None trains all weights.
        lora_alpha: scale of the adapters, whose update is multiplied by `lora_alpha / lora_rank`; None is twice the
            rank.
        lora_dropout: probability of dropping an input of an adapter.
        sequence_length: tokens per sequence.
        segment_length: tokens per training segment, see `segmented_loss`; None for no segments.
        batch_size: sequences per forward pass of a process; with `sequence_parallel`, of a group of processes.
        sequence_parallel: number of processes that share a sequence; divides the number of processes.
        sequence_parallel_strategy: how processes exchange states, see `distributed.exchange`.
        fsdp: shard the model over all processes.
        accumulate: batches per step, whose gradients are accumulated.
        steps: optimizer steps.
        learning_rate: highest learning rate, after the warm-up.
        warmup: fraction of the steps over which the learning rate rises.
        schedule: learning rates after the warm-up: "cosine" decays to `min_lr` along a cosine, "wsd" (warm-up, stable,
            decay) stays and decays to `min_lr` at the end, by 1 minus a square root, "constant" stays.
        decay_steps: with "wsd", number of steps of the decay, or a fraction of the steps if it is below 1; None is 0.2.
        min_lr: lowest learning rate; None is a tenth of `learning_rate`. Not for "constant".
        weight_decay: weight decay of AdamW, on matrices.
        held_out: fraction of the tokens of `data` kept for evaluation, unless there is `validation`; 0 for no
            evaluation.
        eval_tokens: held-out tokens to evaluate on, at most.
        log_every: steps between logs.
        eval_every: steps between evaluations.
        save_every: steps between checkpoints; the last two are kept.
        keep_best: save and keep the checkpoint with the lowest held-out loss too, as the link `best`.
        report_to: names of trackers to log to, of those that transformers knows: "tensorboard", "wandb", "mlflow",
            "trackio" and others.
        dtype: "bfloat16" autocast, or "float32"; "auto" is bfloat16 on a GPU that computes it natively and on a CPU
            with AMX, float32 elsewhere.
        fp8: compute products in float8 and all else as with bfloat16, see `models.use_float8`.
        compile: compile the layers, see `models.compile_layers`; None is True on a GPU where that works, False on a
            CPU.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: seed of weights and data order, below 2^32.
        timeout: seconds to wait for a process that does not answer.
        push_to_hub: repository on the Hugging Face Hub to push the last checkpoint to, at the end of the run:
            "namespace/name", or "name" for the user of the token.
        hub_private: create that repository as a private one.
        hub_base_model: name on the Hub of the model in `init_from`; needed to push LoRA adapters.
        license: license of the model, for its card: an id of the Hub such as "apache-2.0".

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range.

    Example:
        >>> from lightning_attention.training import TrainingOptions
        >>> options = TrainingOptions("run", data="texts", steps=100, sequence_length=256)
    """

    output: Path
    data: tuple[Path, ...] = ()
    validation: tuple[Path, ...] = ()
    text_field: str | None = None
    tokenizer: str = "bytes"
    chat_template: Path | None = None
    eos_token: str | None = None
    size: str = "demo"
    config: Path | None = None
    attention: str | None = None
    decay_preset: str | None = None
    init_from: Path | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    sequence_length: int = 1024
    segment_length: int | None = None
    batch_size: int = 8
    sequence_parallel: int = 1
    sequence_parallel_strategy: str = "all-gather"
    fsdp: bool = False
    accumulate: int = 1
    steps: int = 1000
    learning_rate: float = 2e-3
    warmup: float = 0.05
    schedule: str = "cosine"
    decay_steps: float | None = None
    min_lr: float | None = None
    weight_decay: float = 0.1
    held_out: float = 0.05
    eval_tokens: int = 1 << 18
    log_every: int = 10
    eval_every: int = 200
    save_every: int = 200
    keep_best: bool = False
    report_to: tuple[str, ...] = ()
    dtype: str = "auto"
    fp8: bool = False
    compile: bool | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    timeout: float = 1800.0
    push_to_hub: str | None = None
    hub_private: bool = False
    hub_base_model: str | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        paths: dict[str, Any] = {"output": to_path(self.output, "output")}
        paths |= {name: to_paths(getattr(self, name), name) for name in ("data", "validation")}
        if not isinstance(self.tokenizer, str):  # a name on the hub is no path
            paths["tokenizer"] = str(to_path(self.tokenizer, "tokenizer"))
        for name in ("config", "init_from", "chat_template"):
            if getattr(self, name) is not None:
                paths[name] = to_path(getattr(self, name), name)
        for name, value in (paths | {"report_to": report_names(self.report_to)}).items():
            object.__setattr__(self, name, value)
        for field in fields(self):
            _check_type(field.name, field.type, getattr(self, field.name))
        for name in AT_LEAST_ONE:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {self.sequence_length}")
        if self.config is not None and self.size != type(self).size:
            raise ValueError(f"config and size {self.size!r} describe two models: give one of them")
        self._check_fine_tuning()
        for name, known in (("sequence_parallel_strategy", STRATEGIES), ("dtype", DTYPES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                names = ", ".join(map(repr, known))
                raise ValueError(f"{name} must be one of {names}, got {getattr(self, name)!r}")
        if self.fp8 and self.dtype == "float32":
            raise ValueError("fp8 goes with dtype 'bfloat16' or 'auto', got 'float32'")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed must be at least 0 and below 2^32, got {self.seed}")
        for name, is_right, range_ in (
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("warmup", 0 <= self.warmup <= 1, "between 0 and 1"),
            ("held_out", 0 <= self.held_out < 1, "at least 0 and below 1"),
            ("timeout", self.timeout > 0, "above 0"),
            ("lora_alpha", self.lora_alpha is None or self.lora_alpha > 0, "above 0"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "at least 0 and below 1"),
        ):
            if not is_right:
                raise ValueError(f"{name} must be {range_}, got {getattr(self, name)}")

        self._check_schedule()
        check_push(self)
        if self.keep_best and not self.evaluates:
            raise ValueError("keep_best needs held-out losses: give validation, or a held_out above 0")
        if self.validation and self.held_out != type(self).held_out:
            raise ValueError(f"validation and held_out {self.held_out} name two texts to evaluate on: give one of them")

    def _check_fine_tuning(self) -> None:
        """Check the options of a run that starts from a checkpoint, or trains adapters, against the others."""
        extra = [name for name in OF_THE_MODEL if getattr(self, name) != getattr(type(self), name)]
        if self.init_from is not None and extra:
            raise ValueError(f"init_from takes model and tokenizer from the checkpoint: leave out {', '.join(extra)}")
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_dropout"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{name} needs lora_rank")
            return
        if self.init_from is None:
            raise ValueError("lora_rank needs init_from, the checkpoint of the model that the adapters are for")
        if self.fp8:
            raise ValueError("lora_rank does not go with fp8: adapters are trained in bfloat16 or float32")
        if self.lora_dropout and self.segment_length is not None:
            raise ValueError(
                "lora_dropout must be 0 with segment_length: segments are read twice, and would drop other inputs"
            )

    def _check_schedule(self) -> None:
        if self.min_lr is not None:
            if self.schedule == "constant":
                raise ValueError("min_lr goes with schedule 'cosine' or 'wsd', not with 'constant'")
            if not 0 <= self.min_lr <= self.learning_rate:
                raise ValueError(
                    f"min_lr must be between 0 and the learning_rate {self.learning_rate}, got {self.min_lr}"
                )
        if self.decay_steps is not None:
            if self.schedule != "wsd":
                raise ValueError(f"decay_steps goes with schedule 'wsd', not with {self.schedule!r}")
            if self.decay_steps <= 0 or (self.decay_steps > 1 and self.decay_steps != int(self.decay_steps)):
                raise ValueError(f"decay_steps must be a number of steps, or a fraction, got {self.decay_steps}")
        if self.schedule == "wsd" and self.num_warmup_steps + self.num_decay_steps > self.steps:
            raise ValueError(
                f"{self.num_warmup_steps} steps of warm-up and {self.num_decay_steps} of decay exceed the "
                f"{self.steps} steps: lower warmup or decay_steps"
            )

    @property
    def num_warmup_steps(self) -> int:
        """Number of steps over which the learning rate rises."""
        return round(self.warmup * self.steps)

    @property
    def num_decay_steps(self) -> int:
        """Number of steps of the decay of the schedule "wsd"."""
        given = 0.2 if self.decay_steps is None else self.decay_steps
        return round(given * self.steps) if given < 1 else int(given)

    @property
    def evaluates(self) -> bool:
        """True if the run computes losses of held-out text."""
        return bool(self.validation) or self.held_out > 0

    def with_schedule_of(self, record: dict[str, Any]) -> "TrainingOptions":
        """Copy with the learning rates of a record; what it does not hold is the default."""
        names = "steps", "learning_rate", "warmup", "schedule", "decay_steps", "min_lr"
        return replace(self, keep_best=False, **{name: record.get(name, getattr(type(self), name)) for name in names})

    def save(self) -> None:
        """Write `run.json` atomically; create the folder if it does not exist."""
        self.output.mkdir(parents=True, exist_ok=True)
        files.write(self.output / FILE, self.to_json())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, default=str)

    @classmethod
    def load(cls, output: PathLike) -> "TrainingOptions":
        """Read the options of the run in a folder.

        Raises:
            ValueError: there is no run, or its `run.json` is damaged or holds unknown or invalid options. Options of
                earlier versions are known.
        """
        output = to_path(output, "output")
        file = output / FILE
        try:
            saved: Any = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"no run to resume in {output}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged, it is no JSON: {error}") from error
        if not isinstance(saved, dict):
            raise ValueError(f"{file} is damaged, it holds no options")
        saved = _of_this_version(saved)
        known = {field.name for field in fields(cls)}
        if unknown := set(saved) - known:
            raise ValueError(f"{file} has options this version does not know: {', '.join(sorted(unknown))}")
        try:
            return cls(**{**saved, "output": output})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from error


def resumed_options(
    options: TrainingOptions, record: dict[str, Any] | None, data_size: int
) -> tuple[TrainingOptions, list[str]]:
    """Return the options of a run that resumes from a checkpoint, and a line for every changed option.

    A step keeps its number of sequences: `batch_size` and `accumulate` are adapted to the number of processes. The
    warm-up keeps its number of steps: `warmup` is adapted to the number of steps.

    Args:
        options: options in `run.json`, perhaps edited.
        record: options that the checkpoint was trained with, and `sequences_per_step`; None if unknown.
        data_size: number of processes, or groups of processes, that read sequences of their own.

    Raises:
        ValueError: a changed option cannot change, or the processes cannot share the sequences of a step evenly.
    """
    if record is None:
        return options, []
    record = _of_this_version(record)
    options = _with_warmup_of(options, record)
    for name, (before, now) in _changes(options, record).items():
        if name not in MAY_CHANGE and name != "warmup":
            raise _cannot_change(options, name, before, now)
    total = record["sequences_per_step"]
    if options.batch_size * data_size * options.accumulate != total:
        each, rest = divmod(total, data_size)
        if rest:
            raise ValueError(
                f"a step of this run has {total} sequences, which {data_size} processes cannot share evenly"
            )
        batch_size = next(size for size in range(min(options.batch_size, each), 0, -1) if each % size == 0)
        options = replace(options, batch_size=batch_size, accumulate=each // batch_size)
    changes = _changes(options, record)
    for name in ("output", "warmup"):  # the warm-up keeps its number of steps
        changes.pop(name, None)
    return options, [f"{name} {before} is now {now}" for name, (before, now) in changes.items()]


def _with_warmup_of(options: TrainingOptions, record: dict[str, Any]) -> TrainingOptions:
    """Options with the number of steps of warm-up in a record.

    Raises:
        ValueError: another warm-up is given.
    """
    before, steps = record.get("warmup", options.warmup), record.get("steps", options.steps)
    kept = before if options.steps == steps else min(1.0, round(before * steps) / options.steps)
    if options.warmup not in (before, kept):
        raise _cannot_change(options, "warmup", before, options.warmup)
    return replace(options, warmup=kept)


def _of_this_version(saved: dict[str, Any]) -> dict[str, Any]:
    """Options as this version names them: `bf16`, true or false, became `dtype`."""
    if isinstance(saved.get("bf16"), bool) and "dtype" not in saved:
        saved = saved | {"dtype": "bfloat16" if saved["bf16"] else "float32"}
        del saved["bf16"]
    return saved


def _cannot_change(options: TrainingOptions, name: str, before: Any, now: Any) -> ValueError:
    return ValueError(
        f"{options.output / FILE}: {name} was {before!r} in this run and cannot become {now!r}; "
        "change it back, or start another run"
    )


def _changes(options: TrainingOptions, record: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Old and new values of the options that differ, as in JSON."""
    given = json.loads(options.to_json())
    return {name: (record[name], given[name]) for name in given if name in record and record[name] != given[name]}


def _check_type(name: str, annotation: Any, value: Any) -> None:
    """Check a value against the annotation `int`, `float`, `bool` or `str`, with or without None."""
    kinds: dict[Any, tuple[Any, str]] = {
        int: (Integral, "a whole number"),
        float: (Real, "a number"),
        bool: (bool, "true or false"),
        str: (str, "a string"),
    }
    kind = next((kind for kind in kinds if annotation in (kind, kind | None)), None)
    if kind is None or (value is None and annotation != kind):
        return
    expected, words = kinds[kind]
    if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be {words}, got {value!r}")
    if kind in (int, float) and not -LIMIT <= cast(float, value) <= LIMIT:  # NaN fails too
        raise ValueError(f"{name} must be finite and within 2^53, got {value}")
