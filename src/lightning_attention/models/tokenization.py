"""Tokenizers that begin a text as training begins a document."""

from typing import Any, cast

from tokenizers import processors
from transformers import PreTrainedTokenizerFast


def bos_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids before the text of a training document: the BOS token if the tokenizer has one, else nothing.

    A BOS token that is also the EOS token (as in GPT-2) only ends documents: a new document starts after every EOS, so
    the text would never see it.
    """
    bos = tokenizer.bos_token_id
    return [bos] if isinstance(bos, int) and bos != tokenizer.eos_token_id else []


def begin_with_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    """Make `tokenizer(text)` the beginning of a training document: `bos_ids` and the text, without an EOS token.

    A pair of texts is one document. What the tokenizer added before (BOS, EOS, `[CLS]`, `[SEP]`) is replaced, and the
    change is saved with the tokenizer.
    """
    begin = [str(tokenizer.bos_token)] if bos_ids(tokenizer) else []
    template = processors.TemplateProcessing(
        single=[*(f"{token}:0" for token in begin), "$A:0"],
        pair=[*(f"{token}:0" for token in begin), "$A:0", "$B:1"],
        special_tokens=list(zip(begin, bos_ids(tokenizer), strict=True)),
    )
    backend = tokenizer.backend_tokenizer
    offsets = _byte_level(backend.post_processor)
    backend.post_processor = processors.Sequence([*offsets, template]) if offsets else template


def _byte_level(processor: Any) -> list[processors.ByteLevel]:
    """The parts of a post-processor that correct offsets and add no token."""
    is_sequence = isinstance(processor, processors.Sequence)
    parts: list[Any] = list(cast(Any, processor)) if is_sequence else [processor]
    return [part for part in parts if isinstance(part, processors.ByteLevel)]
