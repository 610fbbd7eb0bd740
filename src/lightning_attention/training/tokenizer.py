"""Tokenizers for training: bytes, or those of transformers."""

import json
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..models.tokenization import begin_with_bos, byte_characters, special_tokens
from ..paths import PathLike
from .tokenizer_files import CONFIG, read_tokenizer, template_beside, tokenizer_file

INPUTS = ["input_ids", "attention_mask"]
# Larger than lengths in transformers, and unlike its value for an unset length, which lm-eval replaces by 2048.
UNLIMITED = 10**21
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# Usual names of these tokens, by priority, for tokenizers without a tokenizer_config.json.
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
# ChatML. Its turns end with `<|im_end|>`, which need not be a special token. Answers are marked, see `conversations`.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PADS = (PAD, "<pad>", "[PAD]", "<|padding|>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of UTF-8 bytes: a token id is the byte; 256 is BOS, 257 is EOS, 258 is padding.

    Its chat template is ChatML, with `<|im_start|>` and `<|im_end|>` as text.

    Example:
        >>> from lightning_attention.training import byte_tokenizer
        >>> byte_tokenizer()("hi").input_ids
        [256, 104, 105]
    """
    wrapped = with_special_tokens(bytes_backend(), bos_token=BOS, eos_token=EOS, pad_token=PAD)
    begin_with_bos(wrapped)
    return wrapped


def bytes_backend() -> Tokenizer:
    """Tokenizer of UTF-8 bytes without special tokens."""
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in byte_characters()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def has_byte_ids(tokenizer: PreTrainedTokenizerFast) -> bool:
    """True if the ids of every text are the bytes of its UTF-8, as with `byte_tokenizer`."""
    content, expected = (json.loads(each.backend_tokenizer.to_str()) for each in (tokenizer, byte_tokenizer()))
    steps = "normalizer", "pre_tokenizer", "model"
    added = {token["content"] for token in content["added_tokens"]}
    return all(content[step] == expected[step] for step in steps) and added <= special_tokens(tokenizer)


def load_tokenizer(
    name: PathLike, eos_token: str | None = None, report: Callable[[str], None] = lambda line: None
) -> PreTrainedTokenizerFast:
    """Load a tokenizer for training.

    `tokenizer(text)` is the BOS token, if there is one, and the text, without truncation or padding, as at the start of
    a training document. If the files name no EOS (end-of-document) or padding token, the first of the usual names in
    the vocabulary is taken (`ENDS`, `PADS`), else a token is added. The BOS token of a tokenizer.json without
    tokenizer_config.json is the special token that its post-processor puts before a text.

    Args:
        name: "bytes", the path of a tokenizer.json or of a folder with a saved tokenizer, or a name on the Hugging Face
            Hub.
        eos_token: token of the vocabulary that ends a document, instead of the tokenizer's own.
        report: called with a line for every special token that was chosen or added.

    Raises:
        TypeError: `name` is not a path.
        ValueError: there is no such tokenizer, the file is not a tokenizer, or `eos_token` is not in its vocabulary.

    Example:
        >>> from lightning_attention.training import load_tokenizer
        >>> load_tokenizer("bytes").eos_token
        '<|eos|>'
    """
    tokenizer = byte_tokenizer() if name == "bytes" else _read(name, report)
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


def _read(name: PathLike, report: Callable[[str], None]) -> PreTrainedTokenizerFast:
    with tokenizer_file(name) as file:
        try:
            backend = Tokenizer.from_file(str(file))
            backend.no_truncation()
            backend.no_padding()  # or transformers adds its padding token to the vocabulary
            if (file.parent / CONFIG).is_file():
                tokenizer = read_tokenizer(file)
            else:
                tokenizer = with_special_tokens(backend, bos_token=_token_before_text(backend))
                tokenizer.chat_template = template_beside(file) or CHAT_TEMPLATE
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(f"{file} is not a tokenizer: {error}") from error
    if added := sorted(tokenizer.get_vocab().keys() - backend.get_vocab().keys()):
        report(f"tokens added to the vocabulary of the tokenizer: {', '.join(added)}")
    tokenizer.padding_side, tokenizer.model_input_names = "left", INPUTS
    tokenizer.model_max_length = UNLIMITED
    return tokenizer


def _token_before_text(tokenizer: Tokenizer) -> str | None:
    """Special token that the post-processor puts before a text, if it is exactly one."""
    if tokenizer.post_processor is None:
        return None
    text = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).encode("a")
    processed = tokenizer.post_processor.process(text)
    return processed.tokens[0] if processed.special_tokens_mask[:2] == [1, 0] else None


def with_special_tokens(tokenizer: Tokenizer, **tokens: str | None) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer, with special tokens by their kinds and ChatML as its chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=INPUTS,
        model_max_length=UNLIMITED,
        chat_template=CHAT_TEMPLATE,
        **tokens,
    )
