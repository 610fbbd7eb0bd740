"""How well a model predicts held-out text, beside what needs no model."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .corpus import PackedDataset


@dataclass(frozen=True)
class Evaluation:
    """Mean losses over the same held-out tokens, in nats a token (a byte, with the byte tokenizer).

    Attributes:
        loss: of the model.
        unigram: of the frequencies of the training part.
        uniform: of all symbols alike, `ln(num_symbols)`.
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
    """Predict every token of the dataset that is a symbol, from those before it in its row and document.

    Args:
        model: a causal language model; left in the mode it was in.
        dataset: held-out rows.
        unigram: `[vocab_size]`, natural logarithm of frequencies, see `Corpus.unigram`.
        num_symbols: tokens below it count, those above it (beginning and end of documents, padding) do not: 256 for
            bytes.
        batch_size: rows at a time.

    Raises:
        ValueError: no token of the dataset counts.
    """
    was_training = model.training
    model.eval()
    log_unigram = unigram.to(torch.float32)[:num_symbols].log_softmax(dim=0)
    loss = unigram_loss = count = 0.0
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        batch = {
            name: torch.stack([row[name] for row in rows]).to(model.device) for name in ("input_ids", "position_ids")
        }
        targets = torch.stack([row["labels"] for row in rows])[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float().cpu()
        counted = (targets >= 0) & (targets < num_symbols)
        targets = targets[counted]
        loss -= logits[counted].log_softmax(dim=-1).gather(1, targets[:, None]).sum().item()
        unigram_loss -= log_unigram[targets].sum().item()
        count += len(targets)
    model.train(was_training)
    if count == 0:
        raise ValueError("the held-out rows hold no token to predict")
    return Evaluation(loss / count, unigram_loss / count, math.log(num_symbols), int(count))
