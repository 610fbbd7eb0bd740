"""A model of 3 layers and 24 channels, and tokens for it."""

from pathlib import Path
from typing import Any

import torch

from lightning_attention.models import LightningConfig, LightningForCausalLM
from lightning_attention.training import byte_tokenizer

VOCAB = 50


def make_config(**options: Any) -> LightningConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    chosen: dict[str, Any] = sizes | {"num_attention_heads": 3, "initializer_range": 0.2} | ids | options
    return LightningConfig(**chosen)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def make_model(dtype: torch.dtype = torch.float64, **options: Any) -> LightningForCausalLM:
    torch.manual_seed(0)
    model = LightningForCausalLM(make_config(**options)).to(dtype)
    for parameter in model.parameters():  # `theta` too, which `to` leaves in float32
        parameter.data = parameter.data.to(dtype)
    return model


def save_checkpoint(folder: Path) -> Path:
    """Save a small model of bytes and its tokenizer in `folder`."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    LightningForCausalLM(make_config(vocab_size=len(tokenizer), **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
