"""A model small enough to check by hand, and tokens for it."""

import torch

from lightning_attention.models import LightningConfig

VOCAB = 50


def make_config(**options) -> LightningConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LightningConfig(**sizes | {"num_attention_heads": 3, "initializer_range": 0.2} | ids | options)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
