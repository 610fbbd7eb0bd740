"""Tokenizers: bytes by default, or any tokenizer.json."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..models.tokenization import begin_with_bos
from ..paths import PathLike, to_path

INPUTS = ["input_ids", "attention_mask"]
# The model reads texts of any length. More than transformers takes for a length, and not its number for "unset", which
# lm-eval would replace by 2048.
UNLIMITED = 10**21
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# Names under which vocabularies have these tokens, where no tokenizer_config.json says so; the first found is taken.
ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    EOS,
    "<eos>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "<|eot_id|>",
)
PADS = (PAD, "<pad>", "[PAD]", "<|padding|>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8, its own number; 256 to 258 are beginning and end of a document, and padding."""
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in _byte_characters()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    framed = _with_special_tokens(tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    begin_with_bos(framed)
    return framed


def load_tokenizer(
    name: PathLike, eos_token: str | None = None, report: Callable[[str], None] = lambda line: None
) -> PreTrainedTokenizerFast:
    """Load `"bytes"`, the path of a tokenizer.json, or of a folder that a tokenizer was saved in.

    A tokenizer whose files name no end-of-document (EOS) or padding token has the one that its vocabulary holds under a
    usual name (`ENDS`, `PADS`), or else is given a new one. `tokenizer(text)` is the beginning of a training document:
    the BOS token, if there is one, and the text, neither truncated nor padded. A tokenizer.json alone names no BOS
    token: it is the one that its post-processor puts before a text.

    Args:
        name: "bytes" or the path.
        eos_token: the token of the vocabulary that ends a document, instead of the tokenizer's own.
        report: called with a line for every special token that was chosen or added.

    Raises:
        TypeError: `name` is no path.
        ValueError: there is no such file, it is no tokenizer, or `eos_token` is not in its vocabulary.

        tokenizer = load_tokenizer("gpt2/tokenizer.json", eos_token="<|endoftext|>")
    """
    tokenizer = byte_tokenizer() if name == "bytes" else _read(to_path(name, "tokenizer"), report)
    if eos_token is not None:
        vocabulary = tokenizer.get_vocab()
        if eos_token not in vocabulary:
            special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
            candidates = [token for token in vocabulary if token in special or token in ENDS] or ["none"]
            raise ValueError(
                f"eos_token {eos_token!r} is not in the vocabulary of the tokenizer {name}; candidates: "
                f"{', '.join(sorted(candidates))}"
            )
        tokenizer.add_special_tokens({"eos_token": eos_token})
    for kind, token, names, new in (("eos_token", "EOS", ENDS, EOS), ("pad_token", "padding", PADS, PAD)):
        if getattr(tokenizer, kind) is None:
            vocabulary = tokenizer.get_vocab()
            chosen = next((known for known in names if known in vocabulary), new)
            tokenizer.add_special_tokens({kind: chosen})
            how = "found in the vocabulary" if chosen in vocabulary else "added to the vocabulary"
            report(f"the tokenizer names no {token} token: {chosen} {how}")
    begin_with_bos(tokenizer)
    return tokenizer


def _read(path: Path, report: Callable[[str], None]) -> PreTrainedTokenizerFast:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"tokenizer must be 'bytes' or a tokenizer.json, there is no file {path}")
    try:
        backend = Tokenizer.from_file(str(file))
        backend.no_truncation()
        backend.no_padding()  # or transformers takes its padding token, and adds it if need be
        if (file.parent / "tokenizer_config.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent)
        else:
            tokenizer = _with_special_tokens(backend, bos_token=_added_before_a_text(backend))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{file} is not a tokenizer: {error}") from error
    if added := sorted(tokenizer.get_vocab().keys() - backend.get_vocab().keys()):
        report(f"tokens added to the vocabulary of the tokenizer: {', '.join(added)}")
    tokenizer.padding_side, tokenizer.model_input_names = "left", INPUTS
    tokenizer.model_max_length = UNLIMITED
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
