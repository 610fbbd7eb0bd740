"""Loading of checkpoints, encoding of prompts, and text streams."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ..models import LightningCache, LightningForCausalLM
from ..models.checkpoint import last_checkpoint, load_model
from ..models.tokenization import begin_with_bos, bos_ids, encode_texts, well_formed
from ..paths import PathLike, to_path
from .sampling import Sampler, SamplingOptions, check_options, choose, stop_token_ids, warn_of_ignored_options
from .text import Detokenizer


def load(checkpoint: PathLike, *, bf16: bool = False) -> tuple[LightningForCausalLM, PreTrainedTokenizerFast]:
    """Load the model and tokenizer of a checkpoint, onto the GPU if there is one.

    `tokenizer(text)` begins with the BOS token as training documents do, also for checkpoints of older versions of this
    library, whose tokenizers did not add it.

    Args:
        checkpoint: folder of a model, or output folder of a run, for its last checkpoint.
        bf16: load the weights in bfloat16; decays and states stay float32.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        TypeError: `checkpoint` is not a path.
        ValueError: there is no checkpoint of this library, or its weights do not fit its configuration.

    Example:
        >>> from lightning_attention.inference import load
        >>> model, tokenizer = load("run")
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
    """Encode a prompt like the start of a training document: the BOS token, if there is one, and the text.

    The name of a special token within the prompt is text, as in training data, unlike in Hugging Face's
    `tokenizer(prompt)`. Add special tokens by their ids: `[*encode(tokenizer, question), tokenizer.eos_token_id]`.

    Args:
        tokenizer: tokenizer of a checkpoint, as `load` returns it.
        prompt: may be empty if the tokenizer has a BOS token.

    Returns:
        Token ids.

    Raises:
        TypeError: the prompt is not a string.
        ValueError: the prompt is empty and the tokenizer has no BOS token, the tokenizer cannot encode the prompt, or
            the tokenizer does not put the BOS token before a text.

    Example:
        >>> from lightning_attention.inference import encode, load
        >>> encode(load("run")[1], "hi")
        [256, 104, 105]
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
        raise ValueError("the prompt is empty, and the tokenizer has no BOS token")
    return ids


def stream(
    model: LightningForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, options: SamplingOptions
) -> Iterator[str]:
    """Generate text after a prompt, and yield it as it is generated.

    Joined, the texts are `tokenizer.decode(new_tokens, skip_special_tokens=True)`. Tokens are computed on demand:
    generation stops when the caller stops reading. Sampling uses a random generator of its own: equal seeds give equal
    tokens here and in the `Engine`, and the global random state is not changed.

    Args:
        model: as `load` returns it.
        tokenizer: as `load` returns it.
        prompt: may be empty if the tokenizer has a BOS token.
        options: how tokens are chosen, and how many.

    Yields:
        Text without special tokens, never empty.

    Raises:
        TypeError: the prompt is not a string, or the options are not `SamplingOptions`.
        ValueError: the prompt cannot be encoded, see `encode`; the prompt and the new tokens exceed the positions of
            the model, see `LightningConfig.max_position_embeddings`; or the model's logits are not finite.

    Example:
        >>> from lightning_attention.inference import SamplingOptions, load, stream
        >>> model, tokenizer = load("run")
        >>> text = "".join(stream(model, tokenizer, "Once upon a time", SamplingOptions(max_new_tokens=8, seed=0)))
    """
    check_options(options)
    warn_of_ignored_options(model)
    ids = encode(tokenizer, prompt)
    model.config.check_length(len(ids) + options.max_new_tokens - 1)
    return _generate(model, Detokenizer(tokenizer), ids, options)


def _generate(
    model: LightningForCausalLM, detokenizer: Detokenizer, prompt: list[int], options: SamplingOptions
) -> Iterator[str]:
    sampler = Sampler(options, prompt, model.config.vocab_size, model.device)
    cache, stop, tokens = LightningCache(model.config.num_hidden_layers), stop_token_ids(model), prompt
    for _ in range(options.max_new_tokens):
        token = choose(_next_logits(model, tokens, cache), [sampler])[0]
        if text := detokenizer.add(token):
            yield text
        if token in stop:
            break
        tokens = [token]
    if rest := detokenizer.rest():
        yield rest


@torch.no_grad()
def _next_logits(model: LightningForCausalLM, tokens: list[int], cache: LightningCache) -> torch.Tensor:
    inputs = torch.tensor([tokens], device=model.device)
    outputs = model(inputs, cache=cache, use_cache=True, output_hidden_states=False, logits_to_keep=1, return_dict=True)
    return outputs.logits[:, -1]
