"""How well a model predicts held-out text, compared with baselines that need no model."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import default_collate
from transformers import PreTrainedModel

from .corpus import PackedDataset


@dataclass(frozen=True)
class Evaluation:
    """Mean losses over the same held-out tokens, in nats a token (a byte, with the byte tokenizer).

    Attributes:
        loss: the model's loss.
        unigram: the loss of predicting by the token frequencies of the training part.
        uniform: the loss of a uniform distribution over the symbols, `ln(num_symbols)`.
        num_tokens: tokens predicted.
    """

    loss: float
    unigram: float
    uniform: float
    num_tokens: int


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, dataset: PackedDataset, unigram: Tensor, num_symbols: int, batch_size: int = 8
) -> Evaluation:
    """Predict every token of the dataset that is a symbol, from the tokens before it in its sequence and document.

    Losses are means over all these tokens, whatever `batch_size`.

    Args:
        model: a causal language model; left in the mode it was in.
        dataset: held-out sequences.
        unigram: `[vocab_size]`, natural logarithm of frequencies, see `Corpus.unigram`.
        num_symbols: tokens below it count; the others (beginning and end of documents, padding) do not: 256 for bytes.
        batch_size: sequences at a time.

    Returns:
        The losses, and how many tokens they are means of.

    Raises:
        ValueError: no token of the dataset counts, or a number is out of range.

        evaluate(model, held_out, corpus.unigram(), num_symbols=256).loss
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 1 <= num_symbols <= len(unigram):
        raise ValueError(f"num_symbols must be between 1 and the {len(unigram)} tokens of unigram, got {num_symbols}")
    was_training = model.training
    model.eval()
    log_unigram = unigram.to(torch.float32)[:num_symbols].log_softmax(dim=0)
    loss = unigram_loss = count = 0.0
    try:
        for start in range(0, len(dataset), batch_size):
            sequences = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            batch = default_collate(sequences)
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
            logits = model(**inputs, use_cache=False).logits[:, :-1].float().cpu()
            targets = batch["labels"][:, 1:]
            counted = (targets >= 0) & (targets < num_symbols)
            targets = targets[counted]
            loss -= logits[counted].log_softmax(dim=-1).gather(1, targets[:, None]).sum().item()
            unigram_loss -= log_unigram[targets].sum().item()
            count += len(targets)
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("the held-out sequences hold no token to predict")
    return Evaluation(loss / count, unigram_loss / count, math.log(num_symbols), int(count))
