"""Precision and compilation of a run, by its options and its device."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from ..models.compilation import compiler_error
from ..models.float8 import float8_error
from .options import TrainingOptions


@dataclass(frozen=True)
class Execution:
    """Precision and compilation of the steps of a run on a device.

    Attributes:
        bf16: bfloat16 autocast; float32 without.
        compiled: the layers are compiled.
        description: the choice, why the faster one was not taken, and the options that change it.
    """

    bf16: bool
    compiled: bool
    description: str


def choose_execution(options: TrainingOptions, device: torch.device) -> Execution:
    """Choose precision and compilation; what the options leave open is what is fast on the device.

    Raises:
        ValueError: the layers are to be compiled, or products in float8, which fails on this machine.
    """
    against_bf16 = _against_bf16(device) if options.dtype == "auto" else None
    bf16 = options.dtype == "bfloat16" or (options.dtype == "auto" and against_bf16 is None)
    if options.fp8 and (error := _against_fp8(device, against_bf16)) is not None:
        raise ValueError(f"fp8 must be off on this machine: {error}")
    against_compiling = None if options.compile is False else _against_compiling(device, options.compile is None)
    if options.compile and against_compiling is not None:
        raise ValueError(f"compile must be off on this machine: {against_compiling}")
    compiled = options.compile is not False and against_compiling is None

    reasons = "; ".join(filter(None, (against_bf16, against_compiling)))
    is_open = options.dtype == "auto" and not options.fp8
    others = [f"--dtype {'float32' if bf16 else 'bfloat16'}"] if is_open else []
    if options.compile is None:
        others.append("--no-compile" if compiled else "--compile")
    precision = ("float8 products, " if options.fp8 else "") + ("bfloat16 autocast" if bf16 else "float32")
    description = f"{precision}, {'compiled' if compiled else 'eager'} layers"
    description += f": {reasons}" if reasons else ""
    description += f" ({', '.join(others)} to change)" if others else ""
    return Execution(bf16, compiled, description)


def _against_bf16(device: torch.device) -> str | None:
    """Return a reason against bfloat16 on a device, or None."""
    if device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        return None if is_native else "this GPU emulates bfloat16"
    if device.type == "cpu":
        return None if torch.cpu._is_amx_tile_supported() else "this CPU has no AMX for bfloat16"
    return f"bfloat16 is chosen on NVIDIA and AMD GPUs and CPUs alone, not on {device.type}"


def _against_fp8(device: torch.device, against_bf16: str | None) -> str | None:
    """Return a reason against products in float8 on a device, or None."""
    if device.type != "cuda":
        return f"float8 products pay on GPUs alone, not on {device.type}"
    return against_bf16 or float8_error(device)


def _against_compiling(device: torch.device, is_automatic: bool) -> str | None:
    """Return a reason against compiled layers on a device, or None."""
    if is_automatic and device.type != "cuda":
        return "by default layers are compiled on a GPU alone"
    if device.type == "cuda" and find_spec("triton") is None:
        return "torch.compile needs Triton, which is not installed"
    return compiler_error(device)
