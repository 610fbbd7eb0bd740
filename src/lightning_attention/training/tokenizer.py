"""Tokenizers: bytes by default, or any tokenizer.json."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..models.tokenization import begin_with_bos
from ..paths import PathLike, to_path

INPUTS = ["input_ids", "attention_mask"]
# The model reads texts of any length. More than transformers takes for a length, and not its number for "unset", which
# lm-eval would replace by 2048.
UNLIMITED = 10**21
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8, its own number; 256 to 258 are beginning and end of a document, and padding."""
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in _byte_characters()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    framed = _with_special_tokens(tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    begin_with_bos(framed)
    return framed


def load_tokenizer(name: PathLike) -> PreTrainedTokenizerFast:
    """`"bytes"`, or the path of a tokenizer.json, or of a folder that a tokenizer was saved in.

    A tokenizer without an end-of-document or padding token is given them. `tokenizer(text)` is then the beginning of a
    training document: the BOS token, if there is one besides the EOS token, and the text. A tokenizer.json that lies
    alone names no BOS token: it is the one that its post-processor puts before a text.

    Raises:
        TypeError: `name` is no path.
        ValueError: there is no such file, or it is no tokenizer.
    """
    if name == "bytes":
        return byte_tokenizer()
    path = to_path(name, "tokenizer")
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"tokenizer must be 'bytes' or a tokenizer.json, there is no file {name}")
    try:
        if (path.parent / "tokenizer_config.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent)
        else:
            backend = Tokenizer.from_file(str(path))
            tokenizer = _with_special_tokens(backend, bos_token=_added_before_a_text(backend))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": EOS})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.padding_side, tokenizer.model_input_names = "left", INPUTS
    tokenizer.model_max_length = UNLIMITED
    begin_with_bos(tokenizer)
    return tokenizer


def _added_before_a_text(tokenizer: Tokenizer) -> str | None:
    """The special token that the post-processor puts before a text, if there is exactly one."""
    if tokenizer.post_processor is None:
        return None
    text = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).encode("a")
    processed = tokenizer.post_processor.process(text)
    return processed.tokens[0] if processed.special_tokens_mask[:2] == [1, 0] else None


def _with_special_tokens(tokenizer: Tokenizer, **tokens: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=INPUTS,
        model_max_length=UNLIMITED,
        **tokens,
    )


def _byte_characters() -> list[tuple[int, str]]:
    """The printable character that stands for each byte in byte-level tokenizers, since GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*((byte, chr(byte)) for byte in printable), *((byte, chr(256 + i)) for i, byte in enumerate(others))]
