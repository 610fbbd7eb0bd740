"""Byte-level BPE tokenizers, trained on text."""

from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..files import complete_or_empty
from ..models.tokenization import begin_with_bos
from ..nn.sizes import check_integer
from ..paths import PathLike, to_path
from .documents import Sources
from .tokenizer import BOS, EOS, PAD, with_special_tokens

TURNS = ("<|im_start|>", "<|im_end|>")  # of ChatML
SPECIAL = (BOS, EOS, PAD, *TURNS)
LEAST = 256 + len(SPECIAL)  # entries: a token for each byte, and the special ones
MAX_BYTES = 1 << 30  # of text: merges hardly change with more


def train_bpe(
    sources: Sources,
    vocab_size: int,
    *,
    max_bytes: int = MAX_BYTES,
    progress: Callable[[int], None] = lambda count: None,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on documents, with the tokens `<|bos|>`, `<|eos|>`, `<|pad|>` and those of ChatML.

    Every text has tokens, since all bytes do. Words are split as in GPT-2. Of conversations, contents of messages are
    read.

    Args:
        sources: the documents, read in their order.
        vocab_size: number of tokens; text with few different words may give fewer.
        max_bytes: bytes of text to read, at most.
        progress: called with the number of bytes of each text that is read.

    Raises:
        TypeError: a number is not an integer.
        ValueError: `vocab_size` is less than 261, `max_bytes` is less than 1, a file cannot be read as text, or there
            is no text.

    Example:
        >>> from lightning_attention.training.bpe import train_bpe
        >>> from lightning_attention.training.documents import Sources
        >>> len(train_bpe(Sources.find("texts"), 300))
        300
    """
    for name, value, least in (("vocab_size", vocab_size, LEAST), ("max_bytes", max_bytes, 1)):
        check_integer(name, value)
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = _Texts(sources, max_bytes, progress)
    tokenizer.train_from_iterator(texts, trainer)
    if texts.error is not None:
        raise texts.error
    if not texts.num_bytes:
        raise ValueError("there is no text to train a tokenizer on")
    wrapped = with_special_tokens(tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    wrapped.add_special_tokens({"additional_special_tokens": list(TURNS)})
    begin_with_bos(wrapped)
    return wrapped


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, output: PathLike) -> Path:
    """Save a tokenizer in a folder that is empty or does not exist.

    Raises:
        ValueError: the folder has content.
        OSError: the folder cannot be written.
    """
    folder = to_path(output, "output")
    check_free(folder)
    with complete_or_empty(folder):
        tokenizer.save_pretrained(folder)
    return folder


def check_free(folder: Path) -> None:
    """Raise a ValueError if a folder has content, or is a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists: choose another output")


class _Texts:
    """Parts of documents, up to a number of bytes; an error ends them and is kept, since tokenizers hides its kind."""

    def __init__(self, sources: Sources, max_bytes: int, progress: Callable[[int], None]):
        self._sources, self._max_bytes, self._progress = sources, max_bytes, progress
        self.num_bytes = 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for document in self._sources.documents():
                for text in document:
                    size = len(text.encode("utf-8", "surrogatepass"))
                    self.num_bytes += size
                    self._progress(size)
                    yield text
                    if self.num_bytes >= self._max_bytes:
                        return
        except Exception as error:
            self.error = error
