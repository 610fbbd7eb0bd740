"""Losses on held-out text: a model, and baselines without one."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate
from transformers import PreTrainedModel

from .corpus import PackedDataset


@dataclass(frozen=True)
class Evaluation:
    """Mean losses over held-out tokens, in nats per token (per byte with the byte tokenizer).

    Attributes:
        loss: loss of the model.
        unigram: loss of the token frequencies in the training part.
        uniform: loss of a uniform distribution over the symbols, `ln(num_symbols)`.
        num_tokens: number of predicted tokens.
    """

    loss: float
    unigram: float
    uniform: float
    num_tokens: int


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, dataset: PackedDataset, unigram: Tensor, num_symbols: int, batch_size: int = 8
) -> Evaluation:
    """Compute the mean loss over all symbols of a dataset, for a model and for baselines.

    Each symbol is predicted from the tokens before it in its sequence and document. The result does not depend on
    `batch_size`.

    Args:
        model: causal language model; its training mode is restored.
        dataset: held-out sequences.
        unigram: `[vocab_size]`, natural logarithms of token frequencies, see `Corpus.unigram`.
        num_symbols: token ids below this number are symbols, 256 for bytes; special tokens are not.
        batch_size: sequences per forward pass.

    Returns:
        Mean losses and the number of predicted tokens.

    Raises:
        ValueError: the dataset has no symbol to predict, or an argument is out of range.

    Example:
        >>> import numpy as np, torch
        >>> from lightning_attention.models import LightningConfig, LightningForCausalLM
        >>> from lightning_attention.training import PackedDataset, evaluate
        >>> model = LightningForCausalLM(LightningConfig.from_size("demo", vocab_size=259))
        >>> dataset = PackedDataset(np.arange(64), 32, document_starts=np.array([0]))
        >>> evaluate(model, dataset, torch.zeros(259), num_symbols=256).num_tokens
        62
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 1 <= num_symbols <= len(unigram):
        raise ValueError(f"num_symbols must be between 1 and the {len(unigram)} tokens of unigram, got {num_symbols}")
    was_training = model.training
    model.eval()
    log_unigram = unigram.to(model.device, torch.float32)[:num_symbols].log_softmax(dim=0)
    loss = unigram_loss = count = 0.0
    try:
        for start in range(0, len(dataset), batch_size):
            sequences = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            batch = {name: x.to(model.device) for name, x in default_collate(sequences).items()}
            ids, position_ids, targets = batch["input_ids"], batch["position_ids"], batch["labels"][:, 1:]
            options = {"use_cache": False, "output_hidden_states": False, "return_dict": True}
            logits = model(input_ids=ids, position_ids=position_ids, **options).logits[:, :-1]
            counted = (targets >= 0) & (targets < num_symbols)
            targets = targets[counted]
            loss += F.cross_entropy(logits[counted].float(), targets, reduction="sum").item()
            unigram_loss -= log_unigram[targets].sum().item()
            count += len(targets)
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("the held-out sequences hold no token to predict")
    return Evaluation(loss / count, unigram_loss / count, math.log(num_symbols), int(count))
