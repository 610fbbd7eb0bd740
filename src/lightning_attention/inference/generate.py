"""From a checkpoint to a stream of text."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ..models import LightningCache, LightningForCausalLM
from ..models.checkpoint import last_checkpoint, load_model
from ..models.tokenization import begin_with_bos, bos_ids, encode_texts, well_formed
from ..paths import PathLike, to_path
from .sampling import Sampler, SamplingOptions, choose, stop_token_ids, warn_of_ignored_options
from .text import Detokenizer


def load(checkpoint: PathLike, *, bf16: bool = False) -> tuple[LightningForCausalLM, PreTrainedTokenizerFast]:
    """The model and tokenizer of a checkpoint, on the GPU if there is one.

    `tokenizer(text)` begins as training documents do, also if the checkpoint was saved by a version of this library
    whose tokenizers did not put the BOS token there.

    Args:
        checkpoint: a folder with a model, or the output folder of a run, whose last checkpoint is taken.
        bf16: weights in bfloat16; decays and states stay float32.

    Raises:
        TypeError: `checkpoint` is no path.
        ValueError: there is no checkpoint, it is not one of this library, or its weights do not fit its configuration.
    """
    folder = last_checkpoint(to_path(checkpoint, "checkpoint"))
    model: Any = load_model(folder, torch.bfloat16 if bf16 else torch.float32)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{folder} holds no tokenizer: {error}") from error
    begin_with_bos(tokenizer)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The tokens of a prompt, as training begins a document: the BOS token, if there is one, and the text.

    What spells a special token within the prompt is text, as in training data. Special tokens are put into a prompt by
    their ids: `[*encode(tokenizer, question), tokenizer.eos_token_id]`. Hugging Face's `tokenizer(prompt)` reads the
    spelling as the token.

    Args:
        tokenizer: of a checkpoint, as `load` returns it.
        prompt: may be empty if the tokenizer has a BOS token.

    Raises:
        TypeError: the prompt is not a string.
        ValueError: the prompt is empty and the tokenizer has no BOS token, the tokenizer cannot encode the prompt, or
            the tokenizer does not put the BOS token before a text.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a string, got {type(prompt).__name__}")
    begin = bos_ids(tokenizer)
    if tokenizer("").input_ids[: len(begin)] != begin:
        raise ValueError(
            f"the tokenizer does not begin a text with its BOS token {tokenizer.bos_token}, as training documents "
            "begin: take the tokenizer that lightning_attention.inference.load returns"
        )
    ids = begin + encode_texts(tokenizer, [well_formed(prompt)])[0].ids
    if not ids:
        raise ValueError("the prompt is empty, and the tokenizer has no token for the beginning of a document")
    return ids


def stream(
    model: LightningForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, options: SamplingOptions
) -> Iterator[str]:
    """Generate the continuation of a prompt, piece by piece.

    The pieces together are `tokenizer.decode(new_tokens, skip_special_tokens=True)`. A token is computed when the next
    piece is asked for, so that nothing goes on after the reader has left. Sampling has its own random numbers: with a
    seed they are those of a request to the `Engine`, and the process's are not touched.

        for text in stream(model, tokenizer, "Once upon a time", SamplingOptions(seed=0)):
            print(text, end="", flush=True)

    Args:
        model: as `load` returns it.
        tokenizer: likewise.
        prompt: may be empty where the tokenizer has a token for the beginning of a document.
        options: how tokens are chosen.

    Raises:
        ValueError: the prompt is empty and the tokenizer has no such token; or the model's logits are not finite.
    """
    warn_of_ignored_options(model)
    return _pieces(model, Detokenizer(tokenizer), encode(tokenizer, prompt), options)


def _pieces(
    model: LightningForCausalLM, detokenizer: Detokenizer, prompt: list[int], options: SamplingOptions
) -> Iterator[str]:
    sampler = Sampler(options, prompt, model.config.vocab_size, model.device)
    cache, stop, tokens = LightningCache(model.config.num_hidden_layers), stop_token_ids(model), prompt
    for _ in range(options.max_new_tokens):
        token = choose(_next_logits(model, tokens, cache), [sampler])[0]
        if piece := detokenizer.add(token):
            yield piece
        if token in stop:
            break
        tokens = [token]
    if rest := detokenizer.rest():
        yield rest


@torch.no_grad()
def _next_logits(model: LightningForCausalLM, tokens: list[int], cache: LightningCache) -> torch.Tensor:
    inputs = torch.tensor([tokens], device=model.device)
    return model(inputs, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
