"""Files of tokenizers: local ones, those of the Hugging Face Hub, and those in other formats than tokenizer.json."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..models.chat import read_template
from ..paths import PathLike, to_path

FILE, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
# Vocabularies that transformers converts.
VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
DOWNLOADED = [
    FILE, CONFIG, TEMPLATE, *VOCABULARIES, "merges.txt", "special_tokens_map.json", "added_tokens.json", "config.json",
    "additional_chat_templates/*",
]  # fmt: skip
EXPECTED = "tokenizer must be 'bytes', a tokenizer.json or its folder, or a name on the Hugging Face Hub"


@contextmanager
def tokenizer_file(name: PathLike) -> Iterator[Path]:
    """Find the tokenizer.json of a tokenizer, beside its other files.

    A name that is no local path is looked up on the Hugging Face Hub, or in its cache. Vocabularies in another format
    are converted by transformers, into a temporary folder. No code from the folder or the hub is run.

    Args:
        name: path of a tokenizer.json or of a folder, or a name on the hub.

    Raises:
        TypeError: `name` is not a path.
        ValueError: there is no such tokenizer, or it cannot be converted.
    """
    path = to_path(name, "tokenizer")
    if not path.exists():
        path = _downloaded(name)
    file = path / FILE if path.is_dir() else path
    if file.is_file():
        yield file
    elif path.is_dir() and any((path / vocabulary).is_file() for vocabulary in VOCABULARIES):
        with TemporaryDirectory() as folder:
            try:
                converted = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
                assert isinstance(converted, PreTrainedTokenizerFast), "it has no fast tokenizer"
                converted.save_pretrained(folder)
            except Exception as error:  # tokenizers raises bare Exceptions
                raise ValueError(f"{name} is not a tokenizer: {_first_line(error)}") from error
            yield Path(folder, FILE)
    else:
        raise ValueError(f"{EXPECTED}: there is no file {file}")


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Read a tokenizer.json beside its tokenizer_config.json, with its special tokens and chat template.

    Tokens that the configuration leaves to a class of transformers, as that of GPT-2 does, are those of that class.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent)
    if tokenizer.eos_token is None:
        known, tokens = tokenizer.special_tokens_map, {}
        with suppress(Exception):  # transformers does not know its class
            tokens = AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False).special_tokens_map
        vocabulary = tokenizer.get_vocab()
        tokenizer.add_special_tokens(
            {kind: token for kind, token in tokens.items() if kind not in known and str(token) in vocabulary}
        )
    return tokenizer


def template_beside(file: Path) -> str | None:
    """Chat template in a file of its own beside a tokenizer.json; None if there is none."""
    return read_template(file.parent / TEMPLATE) if (file.parent / TEMPLATE).is_file() else None


def _downloaded(name: PathLike) -> Path:
    """Folder with the files of a tokenizer on the hub."""
    missing = f"{EXPECTED}: there is no file {name}"
    if not isinstance(name, str):
        raise ValueError(missing)
    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    except Exception as error:  # no name of the hub, unknown there, or no network
        raise ValueError(f"{missing}, and none on the hub: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
