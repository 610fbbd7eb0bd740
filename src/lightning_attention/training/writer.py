"""Writer of the files of a corpus, which goes on where a killed one was."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..files import flush, write
from .blocks import BlockWriter, unfinished, verify
from .documents import Place, Sources
from .encoding import stored_dtype, tokenize
from .formats import NotUtf8Error

TOKENS, DOCUMENTS, CONTEXT, JOURNAL = "tokens.bin", "documents.bin", "context.bin", "journal.json"
OFFSET = np.dtype("<i8")
RANGE = 2 * OFFSET.itemsize  # bytes of a range of tokens
JOURNAL_SECONDS = 30.0  # between two records


class _Mark(NamedTuple):
    """End of a document, in the sources and in the files of the corpus.

    Attributes:
        place: in the sources.
        num_tokens: number of tokens before it.
        num_documents: number of documents before it.
        first_document: number of documents before the source file.
    """

    place: Place = Place(0, 0)
    num_tokens: int = 0
    num_documents: int = 0
    first_document: int = 0


class CorpusWriter:
    """Writer of `tokens.bin`, `documents.bin` and `context.bin` under temporary names.

    A journal records up to which document all are on the disk. It is read by the next writer of the same corpus.

    Args:
        folder: folder of the corpus.
        fingerprint: hash of all that the content depends on.
        sources: the documents.
        tokenizer: with an EOS token.

    Attributes:
        excluded: indices of the source files that turned out not to be text.
    """

    def __init__(self, folder: Path, fingerprint: str, sources: Sources, tokenizer: PreTrainedTokenizerFast):
        self.folder, self.fingerprint, self.sources, self.tokenizer = folder, fingerprint, sources, tokenizer
        self.sizes = [file.stat().st_size for file in sources.files]
        self.token_bytes = stored_dtype(tokenizer).itemsize
        self.excluded: list[int] = []
        self.mark, self.recorded = _Mark(), time.monotonic()
        kept: dict[str, Any] = {TOKENS: (), DOCUMENTS: (), CONTEXT: ()}
        try:
            journal = _read(folder, fingerprint)
        except (OSError, ValueError):
            for leftover in folder.glob("*.unfinished"):
                leftover.unlink()
        else:
            self.excluded, mark, kept = journal["excluded"], journal["mark"], journal["files"]
            self.mark = _Mark(Place(*mark[0]), *mark[1:])
        self.tokens, self.documents, self.context = self.files = [BlockWriter(folder / x, *kept[x]) for x in kept]

    @property
    def num_tokens(self) -> int:
        return self.tokens.size // self.token_bytes

    @property
    def num_documents(self) -> int:
        return self.documents.size // OFFSET.itemsize

    @property
    def num_context_ranges(self) -> int:
        return self.context.size // RANGE

    def document_starts(self) -> np.ndarray:
        """Index of the first token of every document, memory-mapped."""
        self.documents.flush()
        return np.memmap(self.documents.temporary, OFFSET, "r")

    def write(self, progress: Callable[[int, int], None]) -> None:
        """Write the rest of the corpus.

        Args:
            progress: called with the number of bytes of the files that were read so far, and of all.
        """
        while True:
            try:
                return self._write(progress)
            except NotUtf8Error as error:
                if error.file not in self.sources.optional:
                    raise
                self._exclude(self.sources.files.index(error.file))

    def _write(self, progress: Callable[[int, int], None]) -> None:
        num_read, num_bytes = sum(self.sizes[: self.mark.place.file]), sum(self.sizes)

        def count(read: int) -> None:
            nonlocal num_read
            num_read += read

        progress(num_read, num_bytes)
        file, first = self.mark.place.file, self.mark.first_document
        documents = self.sources.documents_from(self.mark.place, set(self.excluded), count)
        for stored, starts, files, place, context in tokenize(documents, self.tokenizer):
            if files and files[-1] != file:
                file, first = files[-1], self.num_documents + files.index(files[-1])
            self.documents.write((np.array(starts, OFFSET) + self.num_tokens).tobytes())
            self.context.write((np.array(context, OFFSET) + self.num_tokens).tobytes())
            self.tokens.write(stored.data)
            if place is not None:
                if place.file != file:  # without text so far
                    file, first = place.file, self.num_documents
                self.mark = _Mark(place, self.num_tokens, self.num_documents, first)
                if time.monotonic() - self.recorded >= JOURNAL_SECONDS:
                    self._record()
            progress(num_read, num_bytes)

    def _exclude(self, file: int) -> None:
        """Go back to the last mark, or to the start of a file that is not text after all."""
        self.excluded.append(file)
        mark = self.mark
        if file == mark.place.file and (first := mark.first_document) < mark.num_documents:
            mark = self.mark = mark._replace(num_tokens=int(self.document_starts()[first]), num_documents=first)
        self.tokens.truncate(mark.num_tokens * self.token_bytes)
        self.documents.truncate(mark.num_documents * OFFSET.itemsize)
        self.context.flush()
        starts = read_ranges(self.context.temporary)[:, 0]
        self.context.truncate(int(np.searchsorted(starts, mark.num_tokens)) * RANGE)
        self._record()  # the last record may be of more

    def _record(self) -> None:
        for file in self.files:
            file.flush()
        content: dict[str, Any] = {"fingerprint": self.fingerprint, "mark": self.mark, "excluded": self.excluded}
        content["files"] = {file.path.name: (file.size, file.checksums) for file in self.files}
        write(unfinished(self.folder / JOURNAL), json.dumps(content | {"checksum": hashed(content)}))
        self.recorded = time.monotonic()

    def finish(self) -> dict[str, list[int]]:
        """Give the files their names, an empty `context.bin` left out; return their checksums."""
        finished = [file for file in self.files if file.size]
        for file in finished:
            file.finish()
        if self.context not in finished:
            self.context.path.unlink(missing_ok=True)  # of another corpus
        flush(self.folder)
        return {file.path.name: file.checksums for file in finished}


def read_ranges(file: Path) -> np.ndarray:
    """Ranges in a file, `[N, 2]` int64, memory-mapped; none in a file that is empty or missing."""
    if not file.exists() or not file.stat().st_size:
        return np.empty((0, 2), OFFSET)
    return np.memmap(file, OFFSET, "r").reshape(-1, 2)


@contextmanager
def corpus_writer(
    folder: Path, fingerprint: str, sources: Sources, tokenizer: PreTrainedTokenizerFast
) -> Iterator[CorpusWriter]:
    """Open a `CorpusWriter`; at the end of the block, remove what is unfinished."""
    writer = CorpusWriter(folder, fingerprint, sources, tokenizer)
    try:
        yield writer
    finally:
        for file in writer.files:
            file.close()
        for leftover in folder.glob("*.unfinished"):
            with suppress(OSError):
                leftover.unlink()


def hashed(content: Any) -> str:
    """SHA-256 of a JSON value."""
    return sha256(json.dumps(content).encode()).hexdigest()


def _read(folder: Path, fingerprint: str) -> dict[str, Any]:
    """Read the journal, verify the unfinished files and cut off what was written after it.

    Raises:
        ValueError: a file is damaged, or the journal is of another corpus.
        OSError: a file cannot be read.
    """
    journal = unfinished(folder / JOURNAL)
    content = json.loads(journal.read_bytes())
    if not isinstance(content, dict) or content.pop("checksum", None) != hashed(content):
        raise ValueError(f"{journal} is damaged")
    if content["fingerprint"] != fingerprint:
        raise ValueError(f"{journal} is of another corpus")
    for name, (size, checksums) in content["files"].items():
        os.truncate(unfinished(folder / name), size)
        verify(unfinished(folder / name), size, checksums)
    return content
