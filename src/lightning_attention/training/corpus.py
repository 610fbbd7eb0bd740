"""Tokenized corpora in memory-mapped files, which may be larger than memory."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from ..files import writable_folder, write
from ..models.heads import IGNORED
from ..models.tokenization import bos_ids, vocab_size
from ..paths import PathLike, to_path
from .blocks import REMEDY, verify
from .conversations import chat_template
from .documents import Sources
from .encoding import special_bytes
from .writer import CONTEXT, DOCUMENTS, OFFSET, RANGE, TOKENS, corpus_writer, hashed, read_ranges

FORMAT = 4
READ = 2, 3, 4  # formats that are read; 3 has no context, and 2 two or four bytes a token
COUNTED = 1 << 22  # tokens counted at a time


@dataclass(frozen=True)
class Corpus:
    """Tokenized corpus in a folder: a training part, followed by a held-out part.

    A document is `[bos] text eos`, with BOS if the tokenizer has one, or a conversation as the chat template renders
    it. The folder holds `tokens.bin`, one, two or four bytes a token; `documents.bin`, the start of every document as
    int64; with conversations `context.bin`, bounds of ranges of tokens without loss as pairs of int64; and
    `corpus.json`, which is written last. The `.bin` files are little-endian.

    Attributes:
        folder: `str` or `os.PathLike`, kept as a `Path`.
        fingerprint: hash of all that the tokens depend on.
        vocab_size: largest token id of the tokenizer, plus one.
        eos_token_id: token at the end of a document.
        num_documents: number of documents in both parts.
        num_train: number of tokens in the training part.
        num_held_out: number of tokens in the held-out part.
        skipped_files: number of files and folders that were skipped.
        token_bytes: bytes of a token in `tokens.bin`.
        special_ids: token ids for which the last byte values stand in `tokens.bin`: with (256, 257), a byte of 254 is
            token 256, and 255 is 257. These values do not occur in UTF-8.
        num_context_ranges: number of ranges of tokens without loss: what is between the answers of conversations.

    Example:
        >>> from lightning_attention.training import Corpus, byte_tokenizer
        >>> from lightning_attention.training.documents import Sources
        >>> corpus = Corpus.prepare("corpus", Sources.find("texts"), byte_tokenizer())
        >>> corpus.training_set(sequence_length=64)[0]["input_ids"].shape
        torch.Size([64])
    """

    folder: Path
    fingerprint: str
    vocab_size: int
    eos_token_id: int
    num_documents: int
    num_train: int
    num_held_out: int
    skipped_files: int
    token_bytes: int = 2
    special_ids: tuple[int, ...] = ()
    num_context_ranges: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", to_path(self.folder, "folder"))
        object.__setattr__(self, "special_ids", tuple(self.special_ids))

    @classmethod
    def prepare(
        cls,
        folder: PathLike,
        sources: Sources,
        tokenizer: PreTrainedTokenizerFast,
        held_out_fraction: float = 0.05,
        progress: Callable[[int, int], None] = lambda num_read, num_bytes: None,
    ) -> "Corpus":
        """Tokenize the sources into `folder`, unless it holds an intact corpus of these sources.

        An error leaves the folder as it was; a folder that did not exist is removed. After a kill, the next call for
        these sources verifies what was written and goes on from there.

        Args:
            folder: created if it does not exist.
            sources: the documents.
            tokenizer: with an EOS token.
            held_out_fraction: fraction of the tokens to hold out, from 0 for none to 1 for all.
            progress: called with the number of bytes of the files that were read so far, and of all.

        Raises:
            ValueError: the documents hold no text or are damaged, the chat template cannot render a conversation, the
                fraction is out of range, or the tokenizer has no EOS token.
            OSError: a file cannot be read or written.
        """
        folder = to_path(folder, "folder")
        if not 0 <= held_out_fraction <= 1:
            raise ValueError(f"held_out_fraction must be between 0 and 1, got {held_out_fraction}")
        if not isinstance(tokenizer.eos_token_id, int):
            raise ValueError("the tokenizer has no end-of-document token")
        fingerprint = _fingerprint(sources, tokenizer, held_out_fraction)
        with suppress(ValueError):
            corpus = cls.open(folder)
            if corpus.fingerprint == fingerprint:
                return corpus
        with writable_folder(folder), corpus_writer(folder, fingerprint, sources, tokenizer) as writer:
            writer.write(progress)
            num_documents, num_tokens = writer.num_documents, writer.num_tokens
            if num_documents == 0:
                raise ValueError("the data holds no text")
            num_train = _held_out_start(writer.document_starts(), num_tokens, held_out_fraction)
            corpus = cls(
                folder=folder,
                fingerprint=fingerprint,
                vocab_size=vocab_size(tokenizer),
                eos_token_id=tokenizer.eos_token_id,
                num_documents=num_documents,
                num_train=num_train,
                num_held_out=num_tokens - num_train,
                skipped_files=sum(sources.skipped.values()) + len(writer.excluded),
                token_bytes=writer.token_bytes,
                special_ids=special_bytes(tokenizer),
                num_context_ranges=writer.num_context_ranges,
            )
            about = {name: value for name, value in asdict(corpus).items() if name != "folder"}
            content: dict[str, Any] = {"format": FORMAT, "corpus": about, "checksums": writer.finish()}
            write(folder / "corpus.json", json.dumps(content | {"checksum": hashed(content)}))
        return corpus

    @classmethod
    def open(cls, folder: PathLike) -> "Corpus":
        """Open a prepared corpus and verify it.

        `corpus.json` and the sizes of the other files are verified in full, checksums in full for files up to 4 GiB,
        and for 1024 evenly spaced blocks of 4 MiB of larger files.

        Raises:
            ValueError: there is no corpus, a file is damaged, or another version of this library wrote the corpus.
            OSError: a file cannot be read.
        """
        folder = to_path(folder, "folder")
        file = folder / "corpus.json"
        try:
            content = json.loads(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"no tokenized corpus in {folder}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged: {REMEDY}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file} is damaged: {REMEDY}")
        if (found := content.get("format", "fingerprint" in content)) not in (*READ, False):
            raise ValueError(
                f"{file} is of another version of this library (format {int(found)}, not {FORMAT}): use that version, "
                "or start a new run, which tokenizes its data again"
            )
        if content.pop("checksum", None) != hashed(content):
            raise ValueError(f"{file} is damaged: {REMEDY}")
        about = content["corpus"]
        if found == 2:
            about["token_bytes"] = 2 if about["vocab_size"] <= 1 << 16 else 4
        corpus = cls(folder=folder, **about)
        for file, size in corpus._sizes().items():
            verify(file, size, content["checksums"][file.name])
        return corpus

    def train_tokens(self) -> "np.ndarray | ByteTokens":
        """Token ids of the training part, memory-mapped: an array, or `ByteTokens`, which are read as one."""
        return self._tokens(slice(0, self.num_train))

    def held_out_tokens(self) -> "np.ndarray | ByteTokens":
        """Token ids of the held-out part, as `train_tokens`."""
        return self._tokens(slice(self.num_train, None))

    def document_starts(self) -> np.ndarray:
        """Index of the first token of every document, over both parts: `[num_documents]` int64, memory-mapped."""
        return np.memmap(self.folder / DOCUMENTS, OFFSET, "r")

    def context(self) -> np.ndarray:
        """Bounds of ranges of tokens without loss, ascending, over both parts: `[N, 2]` int64, memory-mapped."""
        return read_ranges(self.folder / CONTEXT) if self.num_context_ranges else np.empty((0, 2), OFFSET)

    def has_loss(self, start: int, stop: int) -> np.ndarray:
        """Which tokens of the training part from `start` to `stop` have loss, by their place: `[stop - start]` bool."""
        return _has_loss(self.context(), start, stop)

    @property
    def num_predicted_train(self) -> int:
        """Number of tokens with loss in the training part."""
        context = self.context()
        last = np.searchsorted(context[:, 0], self.num_train)
        starts, stops = np.minimum(context[:last], self.num_train).sum(axis=0)
        return self.num_train - int(stops - starts)

    def training_set(self, sequence_length: int) -> "PackedDataset":
        """Training part as packed sequences, see `PackedDataset`."""
        return PackedDataset(self.train_tokens(), sequence_length, self.document_starts(), context=self.context())

    def held_out_set(self, sequence_length: int, max_tokens: int | None = None) -> "PackedDataset":
        """Held-out part as packed sequences, see `PackedDataset`."""
        limit = self.num_held_out if max_tokens is None else max(max_tokens, sequence_length)
        starts = self.document_starts()
        first, last = np.searchsorted(starts, [self.num_train, self.num_train + limit])
        starts = starts[first:last] - self.num_train
        context = self.context()
        first = np.searchsorted(context[:, 1], self.num_train, side="right")
        last = np.searchsorted(context[:, 0], self.num_train + limit)
        context = context[first:last] - self.num_train
        return PackedDataset(self.held_out_tokens(), sequence_length, starts, max_tokens, context)

    def unigram(self) -> Tensor:
        """Natural logarithms of token frequencies in the training part, `[vocab_size]`, with add-one smoothing.

        Tokens without loss are not counted.
        """
        counts = 1 + _counts(self.train_tokens(), self.vocab_size, self.context())
        return torch.from_numpy(counts / counts.sum()).log()

    def _tokens(self, part: slice) -> "np.ndarray | ByteTokens":
        stored = np.memmap(self.folder / TOKENS, f"<u{self.token_bytes}", "r")[part]
        return ByteTokens(stored, self.special_ids) if self.special_ids else stored

    def _sizes(self) -> dict[Path, int]:
        """Expected size of each file in bytes."""
        num_tokens = self.num_train + self.num_held_out
        sizes = {
            self.folder / TOKENS: num_tokens * self.token_bytes,
            self.folder / DOCUMENTS: self.num_documents * OFFSET.itemsize,
        }
        return sizes | ({self.folder / CONTEXT: self.num_context_ranges * RANGE} if self.num_context_ranges else {})


class ByteTokens:
    """Token ids in an array of one byte a token; indices and slices give ids as NumPy does.

    Args:
        stored: bytes.
        special_ids: token ids for which the last byte values stand; other bytes stand for themselves.

    Example:
        >>> import numpy as np
        >>> from lightning_attention.training.corpus import ByteTokens
        >>> ByteTokens(np.array([254, 104, 105, 255], np.uint8), special_ids=(256, 257))[1:]
        array([104, 105, 257], dtype=uint16)
    """

    def __init__(self, stored: np.ndarray, special_ids: Sequence[int]):
        self.stored = stored
        ids = [*range(256 - len(special_ids)), *special_ids]
        self.ids = np.array(ids, np.min_scalar_type(max(ids)))

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: Any) -> Any:
        return self.ids[self.stored[index]]


class PackedDataset(Dataset):
    """Documents packed into sequences of `sequence_length` tokens; a document may span several sequences.

    An item holds `input_ids`, `labels` and `position_ids`, `[T]` int64. Positions restart with every document, so that
    attention does not cross document boundaries. The first token of a document and tokens in `context` are not labels.
    With `context`, sequences without labels are left out.

    Args:
        tokens: token ids, memory-mapped or in any array, or `ByteTokens`.
        sequence_length: T, at least 2.
        document_starts: index of the first token of every document, ascending.
        max_tokens: number of tokens to use, at most.
        context: bounds of ranges of tokens without loss, `[N, 2]`, ascending; None for no such tokens.

    Attributes:
        num_left_out: number of sequences that are left out.

    Raises:
        ValueError: T is out of range, there are fewer tokens than one sequence, or `context` is not `[N, 2]`.
        TypeError: `document_starts` or `context` is not an array of int64.

    Example:
        >>> import numpy as np
        >>> from lightning_attention.training import PackedDataset
        >>> dataset = PackedDataset(np.array([256, 97, 257, 256, 98, 257]), 6, document_starts=np.array([0, 3]))
        >>> dataset[0]["position_ids"]
        tensor([0, 1, 2, 0, 1, 2])
    """

    def __init__(
        self,
        tokens: np.ndarray | ByteTokens,
        sequence_length: int,
        document_starts: np.ndarray,
        max_tokens: int | None = None,
        context: np.ndarray | None = None,
    ):
        context = np.empty((0, 2), OFFSET) if context is None else context
        if sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {sequence_length}")
        if len(tokens) < sequence_length:
            raise ValueError(f"there are {len(tokens)} tokens, fewer than one sequence of {sequence_length}")
        for name, array in (("document_starts", document_starts), ("context", context)):
            if getattr(array, "dtype", None) != OFFSET:
                raise TypeError(f"{name} must be a NumPy array of int64, got {type(array).__name__}")
        if context.ndim != 2 or context.shape[1] != 2:
            raise ValueError(f"context must be [N, 2], got shape {context.shape}")
        self.tokens = tokens if max_tokens is None else tokens[: max(max_tokens, sequence_length)]
        self.sequence_length, self.document_starts, self.context = sequence_length, document_starts, context
        self._kept = self._with_labels() if len(context) else range(len(self.tokens) // sequence_length)
        self.num_left_out = len(self.tokens) // sequence_length - len(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def loss_of(self, log_frequencies: Tensor) -> float:
        """Mean loss in nats per token of the token frequencies `[vocab_size]`, in natural logarithms."""
        counts = _counts(self.tokens, len(log_frequencies), self.context)
        return -(torch.from_numpy(counts) * log_frequencies).sum().item() / counts.sum().item()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._kept[index]) * self.sequence_length
        stop = start + self.sequence_length
        tokens = torch.from_numpy(self.tokens[start:stop].astype(np.int64))
        first, last = np.searchsorted(self.document_starts, [start, stop])
        positions = np.arange(self.sequence_length)
        starts = np.zeros_like(positions)
        bounds = self.document_starts[first:last] - start
        starts[bounds] = bounds
        positions = torch.from_numpy(positions - np.maximum.accumulate(starts))
        is_label = (positions != 0) & torch.from_numpy(_has_loss(self.context, start, stop))
        return {"input_ids": tokens, "labels": tokens.masked_fill(~is_label, IGNORED), "position_ids": positions}

    def _with_labels(self) -> np.ndarray:
        """Indices of the sequences with labels, ascending."""
        length, found = self.sequence_length, []
        size = max(1, COUNTED // length) * length
        for start in range(0, len(self.tokens) // length * length, size):
            stop = min(start + size, len(self.tokens) // length * length)
            is_label = _has_loss(self.context, start, stop)
            first, last = np.searchsorted(self.document_starts, [start, stop])
            is_label[self.document_starts[first:last] - start] = False
            found.append(start // length + np.flatnonzero(is_label.reshape(-1, length)[:, 1:].any(axis=1)))
        return np.concatenate(found)


def _has_loss(context: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Which tokens from `start` to `stop` are in no range of `context`: `[stop - start]` bool."""
    first = np.searchsorted(context[:, 1], start, side="right")
    last = np.searchsorted(context[:, 0], stop)
    # A range adds one from its start on, and takes it away from its stop on.
    bounds = np.clip(context[first:last] - start, 0, stop - start)
    changes = np.zeros(stop - start + 1, np.int64)
    np.add.at(changes, bounds[:, 0], 1)
    np.add.at(changes, bounds[:, 1], -1)
    return changes.cumsum()[:-1] == 0


def _counts(tokens: np.ndarray | ByteTokens, vocab_size: int, context: np.ndarray) -> np.ndarray:
    """Count each token id, without tokens in `context`: `[vocab_size]` int64."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), COUNTED):
        block = tokens[start : start + COUNTED]
        counts += np.bincount(block[_has_loss(context, start, start + len(block))], minlength=vocab_size)
    return counts


def _fingerprint(sources: Sources, tokenizer: PreTrainedTokenizerFast, held_out_fraction: float) -> str:
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    frame = [bos_ids(tokenizer), tokenizer.eos_token_id, sorted(tokenizer.all_special_tokens)]
    frame += [chat_template(tokenizer), tokenizer.special_tokens_map]
    return hashed([FORMAT, sources.describe(), sources.text_field, vocabulary, frame, held_out_fraction])


def _held_out_start(document_starts: np.ndarray, num_tokens: int, held_out_fraction: float) -> int:
    """Index of the first held-out token: a document start if that at most doubles the held-out part."""
    start = num_tokens - math.ceil(num_tokens * held_out_fraction)
    earliest = num_tokens - math.ceil(num_tokens * min(2 * held_out_fraction, 1.0))
    if start in (0, num_tokens):
        return start
    document = int(document_starts[np.searchsorted(document_starts, start, side="right") - 1])
    return document if document >= max(earliest, 1) else start
