"""Training steps as `train` makes them, beside a LLaMA of equal size from transformers."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_attention.models import LightningConfig, LightningForCausalLM, compile_layers, use_float8
from lightning_attention.models.mixers import attention_options
from lightning_attention.training import byte_tokenizer

from .harness import Comparison, release
from .report import OURS, Column, Record, Table, dtype_name, field, rounded, times_ours
from .run import Benchmark
from .scaling import num_parameters

LLAMA = "LLaMA (transformers)"
FLOAT8 = "float8 products"
Step = Callable[[], Tensor]  # trains a model, and returns the loss
# NVIDIA's figures for dense products in bfloat16, in operations per second.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class SpeedCase:
    """Step of a model on random tokens, in sequences of `length` tokens."""

    size: str
    length: int
    tokens: int

    @property
    def batch_size(self) -> int:
        return self.tokens // self.length


def default_tokens(size: str) -> int:
    """Tokens of a step that fit into 80 GiB."""
    return {"385M": 1 << 16, "1B": 1 << 14, "3B": 1 << 13, "7B": 1 << 12, "15B": 1 << 12}.get(size, 1 << 13)


@dataclass(frozen=True)
class Steps:
    """Seconds of a step and of the first one, with compilation; memory of a step, and the first loss."""

    seconds: float
    first_seconds: float
    peak_bytes: int | None
    loss: float


def benchmark(
    cases: list[SpeedCase],
    device: torch.device,
    dtype: torch.dtype,
    *,
    attentions: Sequence[str] = (),
    fp8: bool = False,
    compiled: bool,
    steps: int,
) -> Benchmark:
    """Measure steps with AdamW, in autocast of a dtype, of models whose layers are compiled or not.

    Args:
        attentions: others besides lightning attention, as `TrainingOptions` takes them.
        fp8: also measure our model with products in float8.
    """

    def measure_case(case: SpeedCase, bandwidth: float) -> list[Record]:
        return measure(case, device, dtype, attentions, fp8=fp8, compiled=compiled, steps=steps)

    return Benchmark("speed", cases, measure_case, _title, _TABLE, max(map(_needed_bytes, cases)))


def config_of(size: str, **options: Any) -> LightningConfig:
    """Configuration of a size. "demo" reads bytes: logits of the default vocabulary would take most of its time."""
    if size == "demo":
        options["vocab_size"] = len(byte_tokenizer())
    return LightningConfig.from_size(size, **options)


def _needed_bytes(case: SpeedCase) -> int:
    """Least memory: float32 weights, gradients and two moments, and the input of every layer."""
    config = config_of(case.size)
    return 16 * num_parameters(config) + 2 * case.tokens * config.num_hidden_layers * config.hidden_size


def measure(
    case: SpeedCase,
    device: torch.device,
    dtype: torch.dtype,
    attentions: Sequence[str] = (),
    *,
    fp8: bool = False,
    compiled: bool,
    steps: int,
) -> list[Record]:
    """Measure a case.

    Returns:
        Of every model: `seconds` of a step, see `compare_steps`; `tokens_per_second`;
        `peak_share`, the share of the GPU's peak by 6 operations a parameter and token; `times_ours`; `peak_bytes`,
        with weights, gradients and moments; `first_seconds`, of the first step, with compilation; and `loss`, of the
        first step.
    """
    config = config_of(case.size)
    models: dict[str, Callable[[], nn.Module]] = {OURS: lambda: LightningForCausalLM(config)}
    for attention in attentions:
        models[f"{attention} attention"] = partial(_with_attention, case, attention)
    if fp8:
        models[FLOAT8] = partial(_with_float8, config)
    models[LLAMA] = partial(_llama, config)
    sizes: dict[str, int] = {}

    def make_step(name: str, create: Callable[[], nn.Module]) -> Step:
        torch.manual_seed(0)
        with device:
            model = create().train()
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
        return random_step(model, case.batch_size, case.length, device, dtype, compiled=compiled)

    comparison = compare_steps({name: partial(make_step, name, models[name]) for name in models}, device, steps)
    times = {name: prepared.seconds for name, prepared in comparison.prepared.items()}
    peak = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in _name(device)), None)

    def results(name: str, result: Steps) -> Record:
        flops = 6 * sizes[name] * case.tokens / result.seconds
        return {
            "parameters": sizes[name],
            "seconds": rounded(result.seconds),
            "tokens_per_second": rounded(case.tokens / result.seconds),
            "peak_share": rounded(flops / peak) if peak else None,
            "times_ours": times_ours(times, name),
            "peak_bytes": result.peak_bytes,
            "first_seconds": rounded(result.first_seconds),
            "loss": rounded(result.loss),
        }

    return comparison.records(
        {
            "size": case.size,
            "batch_size": case.batch_size,
            "length": case.length,
            "dtype": dtype_name(dtype),
            "compiled": compiled,
        },
        results,
    )


def _with_attention(case: SpeedCase, attention: str) -> nn.Module:
    options = attention_options(attention) | {"max_position_embeddings": case.length}
    return LightningForCausalLM(config_of(case.size, **options))


def _with_float8(config: LightningConfig) -> nn.Module:
    model = LightningForCausalLM(config)
    use_float8(model)
    return model


def _llama(config: LightningConfig) -> nn.Module:
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "tie_word_embeddings",
    )  # fmt: skip
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    options |= {"max_position_embeddings": 1 << 20, "attn_implementation": "sdpa"}
    return LlamaForCausalLM(LlamaConfig(**options))


def random_step(
    model: Any, batch_size: int, length: int, device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> Step:
    """Function that trains a model by a step on random tokens; compiles its layers, if asked to."""
    is_ours = isinstance(model, LightningForCausalLM)
    if compiled and is_ours:
        compile_layers(model)
    elif compiled:
        for layer in model.model.layers:
            layer.compile()
    tokens = torch.randint(model.config.vocab_size, (batch_size, length), device=device)
    options = {"skip_logits": True} if is_ours else {}
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False, **options}
    return training_step(model, inputs, device, dtype)


def compare_steps(makers: Mapping[str, Callable[[], Step]], device: torch.device, steps: int) -> Comparison[Steps]:
    """Measure `steps` steps of every model, after others that warm it up.

    On a GPU, whose memory one model may fill, models run one after another: a time is the mean of steps that follow
    each other. On a CPU, whose speed varies, models take turns: a time is the median.

    Args:
        makers: functions that create a model and return its step, by name.
    """
    comparison: Comparison[Any] = Comparison(device)
    if device.type == "cuda":
        for name, make_step in makers.items():
            comparison.prepare(name, lambda make_step=make_step: measure_steps(make_step(), device, steps))
            gc.collect()
            torch.compiler.reset()
            release(device)
        return comparison
    created: dict[str, Step] = {}

    def first_steps(name: str) -> Steps:
        created[name] = makers[name]()
        return measure_steps(created[name], device, steps=1)

    for name in makers:
        comparison.prepare(name, partial(first_steps, name))
    seconds: dict[str, list[float]] = {name: [] for name in comparison.prepared}
    for _ in range(steps):
        for name, spent in seconds.items():
            start = time.perf_counter()
            created[name]()
            spent.append(time.perf_counter() - start)
    for name, spent in seconds.items():
        comparison.prepared[name] = replace(comparison.prepared[name], seconds=statistics.median(spent))
    return comparison


def training_step(model: nn.Module, inputs: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Step:
    """Function that trains a model by a step of AdamW, always on the same inputs, and returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")

    def step() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def measure_steps(step: Step, device: torch.device, steps: int) -> Steps:
    """Measure `steps` steps after two others."""
    start = time.perf_counter()
    loss = step().item()
    first_seconds = time.perf_counter() - start
    step().item()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    losses = [step() for _ in range(steps)]
    losses[-1].item()
    seconds = (time.perf_counter() - start) / steps
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Steps(seconds, first_seconds, peak, loss)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _title(case: SpeedCase, bandwidth: float) -> str:
    return f"{case.size}, {case.batch_size} x {case.length} tokens"


_TABLE = Table(
    {
        "": [
            Column("tokens/s", 11, field("tokens_per_second"), ".4g"),
            Column("of peak", 9, field("peak_share"), ".0%"),
            Column("ours", 8, field("times_ours"), ".3g", "x"),
            Column("GiB", 8, field("peak_bytes", scale=2**-30), ".3g"),
            Column("first s", 9, field("first_seconds"), ".3g"),
            Column("loss", 9, field("loss"), ".4g"),
        ]
    }
)
