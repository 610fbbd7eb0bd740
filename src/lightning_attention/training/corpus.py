"""Tokens on disk: one file, memory-mapped, so that a corpus may be larger than memory."""

import copy
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from ..models.tokenization import bos_ids
from ..paths import PathLike, to_path
from .documents import Sources

FORMAT = 1
BATCH = 1 << 22  # characters tokenized at a time


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus in a folder: `tokens.bin`, and `corpus.json` which is written last.

    A document is `[bos] tokens eos`. The last part of the file is held out.

    Attributes:
        folder: where it lies; `str` or `os.PathLike`, kept as a `Path`.
        fingerprint: of everything that the tokens depend on.
        vocab_size: number of tokens of the tokenizer.
        eos_token_id: the token that ends a document.
        num_documents: of both parts.
        num_train: tokens to train on.
        num_held_out: tokens after those.
        skipped_files: files found that are not text.
    """

    folder: Path
    fingerprint: str
    vocab_size: int
    eos_token_id: int
    num_documents: int
    num_train: int
    num_held_out: int
    skipped_files: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", to_path(self.folder, "folder"))

    @classmethod
    def prepare(
        cls,
        folder: PathLike,
        sources: Sources,
        tokenizer: PreTrainedTokenizerFast,
        held_out_fraction: float = 0.05,
        progress: Callable[[int], None] = lambda characters: None,
    ) -> "Corpus":
        """The corpus in `folder`, tokenized now unless it was already, from the same files.

        Args:
            folder: created if need be.
            sources: the documents.
            tokenizer: must have an end-of-document token.
            held_out_fraction: part of the tokens to hold out, between 0 and 1.
            progress: called with the characters read so far.

        Raises:
            ValueError: the documents hold no text, the fraction is out of range, or the tokenizer has no eos token.
        """
        folder = to_path(folder, "folder")
        if not 0 < held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must be between 0 and 1, got {held_out_fraction}")
        vocabulary, eos_token_id = tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id
        if not isinstance(eos_token_id, int):
            raise ValueError("the tokenizer has no end-of-document token")
        frame = [bos_ids(tokenizer), eos_token_id]
        content = [FORMAT, sources.describe(), sources.text_field, vocabulary, frame, held_out_fraction]
        fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        if (folder / "corpus.json").is_file():
            corpus = cls.open(folder)
            if corpus.fingerprint == fingerprint:
                return corpus
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        dtype = _dtype(len(tokenizer))
        unfinished = folder / "tokens.unfinished"
        num_tokens = num_documents = 0
        try:
            with unfinished.open("wb") as file:
                for tokens, ends in _tokenize(sources, tokenizer, progress):
                    file.write(np.array(tokens, dtype=dtype).tobytes())
                    num_tokens += len(tokens)
                    num_documents += ends
            if num_documents == 0:
                raise ValueError("the data holds no text")
        except BaseException:
            if is_new:
                shutil.rmtree(folder)
            raise
        os.replace(unfinished, folder / "tokens.bin")
        stream = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r")
        num_train = _cut(stream, eos_token_id, held_out_fraction)
        corpus = cls(
            folder=folder,
            fingerprint=fingerprint,
            vocab_size=len(tokenizer),
            eos_token_id=eos_token_id,
            num_documents=num_documents,
            num_train=num_train,
            num_held_out=num_tokens - num_train,
            skipped_files=sources.skipped,
        )
        description = {name: value for name, value in asdict(corpus).items() if name != "folder"}
        (folder / "corpus.unfinished").write_text(json.dumps(description, indent=1))
        os.replace(folder / "corpus.unfinished", folder / "corpus.json")
        return corpus

    @classmethod
    def open(cls, folder: PathLike) -> "Corpus":
        """A corpus that was prepared before.

        Raises:
            ValueError: there is none.
        """
        folder = to_path(folder, "folder")
        try:
            return cls(folder=folder, **json.loads((folder / "corpus.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"no tokenized corpus in {folder}") from error

    def train_tokens(self) -> np.ndarray:
        return self._stream()[: self.num_train]

    def held_out_tokens(self) -> np.ndarray:
        return self._stream()[self.num_train :]

    def unigram(self) -> Tensor:
        """Natural logarithm of the frequency of every token in the training part, one added to each count."""
        counts, tokens = np.ones(self.vocab_size, dtype=np.int64), self.train_tokens()
        for start in range(0, len(tokens), BATCH):
            counts += np.bincount(tokens[start : start + BATCH], minlength=self.vocab_size)
        return torch.from_numpy(counts / counts.sum()).log()

    def _stream(self) -> np.ndarray:
        return np.memmap(self.folder / "tokens.bin", dtype=_dtype(self.vocab_size), mode="r")


class PackedDataset(Dataset):
    """Rows of `sequence_length` tokens, document after document, cut wherever a row ends.

    An item holds `input_ids`, `labels` and `position_ids`, `[T]` int64. Positions restart with every document, by which
    the model keeps documents apart; the first token of a document is no label, nothing of its own stands before it.

    Args:
        tokens: memory-mapped, or any array.
        sequence_length: T, at least 2.
        eos_token_id: the token that ends a document.
        max_tokens: use no more than so many.

    Raises:
        ValueError: T is out of range, or there are fewer tokens than one row.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, eos_token_id: int, max_tokens: int | None = None):
        if sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {sequence_length}")
        if len(tokens) < sequence_length:
            raise ValueError(f"there are {len(tokens)} tokens, fewer than one sequence of {sequence_length}")
        self.tokens = tokens if max_tokens is None else tokens[: max(max_tokens, sequence_length)]
        self.sequence_length, self.eos_token_id = sequence_length, eos_token_id

    def __len__(self) -> int:
        return len(self.tokens) // self.sequence_length

    def loss_of(self, log_frequencies: Tensor) -> float:
        """Mean loss in nats of predicting every token by `[vocab_size]` frequencies alone."""
        counts = np.bincount(self.tokens, minlength=len(log_frequencies))
        return -(torch.from_numpy(counts) * log_frequencies).sum().item() / len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.sequence_length
        tokens = torch.from_numpy(self.tokens[start : start + self.sequence_length].astype(np.int64))
        at = torch.arange(self.sequence_length, device=tokens.device)
        starts = torch.zeros_like(at)
        starts[1:] = torch.where(tokens[:-1] == self.eos_token_id, at[1:], 0)
        starts = starts.cummax(dim=0).values
        positions = at - starts
        return {"input_ids": tokens, "labels": tokens.masked_fill(positions == 0, -100), "position_ids": positions}


def _dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _tokenize(
    sources: Sources, tokenizer: PreTrainedTokenizerFast, progress: Callable[[int], None]
) -> Iterator[tuple[list[int], int]]:
    """Tokens in order, and how many documents end among them."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True  # what looks like a special token in a text is text
    backend.no_truncation()
    backend.no_padding()
    before, after = bos_ids(tokenizer), [x for x in (tokenizer.eos_token_id,) if isinstance(x, int)]
    read = 0
    for batch in _batches(sources):
        tokens: list[int] = []
        encodings = backend.encode_batch([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            tokens += chain(before if piece.starts else [], encoding.ids, after if piece.ends else [])
        yield tokens, sum(piece.ends for piece in batch)
        read += sum(len(piece.text) for piece in batch)
        progress(read)


class _Piece(NamedTuple):
    text: str
    starts: bool
    ends: bool


def _batches(sources: Sources) -> Iterator[list[_Piece]]:
    batch, waiting = [], 0
    for document in sources.documents():
        pieces = filter(None, document)
        text, starts = next(pieces, None), True
        while text is not None:
            following = next(pieces, None)
            batch.append(_Piece(text, starts, following is None))
            waiting += len(text)
            text, starts = following, False
            if waiting >= BATCH:
                yield batch
                batch, waiting = [], 0
    if batch:
        yield batch


def _cut(stream: np.ndarray, eos_token_id: int, held_out_fraction: float) -> int:
    """Where the held-out part starts: at a document, if one starts not too far before."""
    cut = len(stream) - math.ceil(len(stream) * held_out_fraction)
    earliest = len(stream) - math.ceil(len(stream) * min(2 * held_out_fraction, 1.0))
    for stop in range(cut, earliest, -BATCH):
        start = max(stop - BATCH, earliest)
        ends = np.flatnonzero(stream[start:stop] == eos_token_id)
        if len(ends):
            return start + int(ends[-1]) + 1
    return cut
