"""Bytes of text that tokens stand for: losses in bits per byte compare runs with different tokenizers."""

import json
import math
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..models.heads import IGNORED
from ..models.tokenization import byte_characters, special_tokens, vocab_size
from .corpus import Corpus

BLOCK, BLOCKS = 1 << 16, 256  # tokens, and number of blocks, that `bytes_per_token` reads of a larger corpus


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray | None:
    """Count the bytes of UTF-8 text that each token stands for.

    Args:
        tokenizer: the byte tokenizer, or a byte-level BPE as those of GPT-2 and Llama 3.

    Returns:
        `[vocab_size]` int64, 0 for special tokens. None if tokens are not bytes of the text: the tokenizer normalizes,
        puts a space before a text or drops spaces, lacks bytes, or has a special token that is also a character.

    Example:
        >>> from lightning_attention.training import byte_tokenizer
        >>> from lightning_attention.training.text_bytes import token_bytes
        >>> int(token_bytes(byte_tokenizer()).sum())
        256
    """
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, special = tokenizer.get_vocab(), special_tokens(tokenizer)
    added = [token for token in content["added_tokens"] if token["content"] not in special]
    if (
        content["normalizer"] is not None
        or not _keeps_bytes(content["pre_tokenizer"])
        or any(content["model"].get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix"))
        or any(character not in vocabulary for _, character in byte_characters())
        or any(len(token) == 1 for token in special)
        or any(token["lstrip"] or token["rstrip"] for token in added)
    ):
        return None
    lengths = np.zeros(vocab_size(tokenizer), np.int64)
    for token, index in vocabulary.items():
        lengths[index] = 0 if token in special else len(token)  # a character for each byte
    for token in added:
        lengths[token["id"]] = len(token["content"].encode())
    return lengths


def bits_per_nat(corpus: Corpus, lengths: np.ndarray) -> float | None:
    """Factor from nats per token to bits per byte in the training part of a corpus.

    Args:
        corpus: of the tokenizer of `lengths`. Of more than 2^24 tokens, as many in evenly spaced blocks are counted.
        lengths: see `token_bytes`.

    Returns:
        Predicted tokens per byte of text, over ln 2; None if there is no byte.
    """
    tokens, starts, num_bytes, num_tokens = corpus.train_tokens(), corpus.document_starts(), 0, 0
    num_blocks = -(-len(tokens) // BLOCK)
    for block in np.unique(np.linspace(0, num_blocks - 1, min(num_blocks, BLOCKS)).astype(np.int64)):
        begin = int(block) * BLOCK
        end = min(begin + BLOCK, len(tokens))
        is_predicted = corpus.has_loss(begin, end)
        first, last = np.searchsorted(starts, [begin, end])
        is_predicted[starts[first:last] - begin] = False
        num_bytes += int(lengths[tokens[begin:end]][is_predicted].sum())
        num_tokens += int(is_predicted.sum())
    return num_tokens / num_bytes / math.log(2) if num_bytes else None


def num_text_bytes(items: list[dict[str, Tensor]], lengths: np.ndarray) -> int:
    """Count the bytes of the tokens to predict, see `batches.num_labels`."""
    labels = (item["labels"][1:].numpy() for item in items)
    return sum(int(lengths[x[x != IGNORED]].sum()) for x in labels)


def _keeps_bytes(pre_tokenizer: dict[str, Any] | None) -> bool:
    """True if a pre-tokenizer splits a text, and maps all its bytes to characters."""
    steps = [pre_tokenizer or {"type": None}]
    if steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    return steps[-1]["type"] == "ByteLevel" and all(
        (step["type"] == "ByteLevel" and not step["add_prefix_space"])
        or (step["type"] == "Split" and step["behavior"] != "Removed")
        or step["type"] == "Digits"
        for step in steps
    )
