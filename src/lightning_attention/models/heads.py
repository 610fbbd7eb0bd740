"""Heads on `LightningModel`: the language model, and transformers' generic heads for classification."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..nn import linear_cross_entropy
from ..nn.gates import is_plain_linear
from ..nn.invariant import invariant_functions
from .base import LightningPreTrainedModel
from .cache import CACHE, CacheName, LightningCache, resolve_cache
from .configuration import LightningConfig
from .model import LightningModel

# Keyword arguments of `transformers.loss.ForCausalLMLoss` other than logits, labels and vocab_size.
LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")
IGNORED = -100  # label of a token that is left out of the loss


@dataclass
class LightningOutput(CacheName, CausalLMOutputWithPast):  # pyright: ignore[reportIncompatibleVariableOverride]
    """transformers' output, with `states` as in `LightningModelOutput`."""

    states: tuple[Tensor, ...] | None = None


class LightningForCausalLM(LightningPreTrainedModel, GenerationMixin):
    """Causal language model: `LightningModel` and logits over the vocabulary.

    Example:
        >>> import torch
        >>> from lightning_attention.models import LightningConfig, LightningForCausalLM
        >>> model = LightningForCausalLM(LightningConfig.from_size("demo", vocab_size=256))
        >>> tokens = torch.randint(256, (2, 10))
        >>> output = model(tokens, labels=tokens)
        >>> output.logits.shape, output.loss.shape
        (torch.Size([2, 10, 256]), torch.Size([]))
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LightningConfig):
        super().__init__(config)
        self.model = LightningModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LightningCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        states: Sequence[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: LightningCache | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> LightningOutput:
        """Compute logits, and the loss if labels are given.

        The loss is computed from chunks of logits (`nn.linear_cross_entropy`), unless `loss_function` has been set or
        `lm_head` is other than a plain linear layer: replaced or wrapped, with a bias or with hooks.

        Args:
            labels: `[B, T]` tokens, usually `input_ids`; shifted here, so that token t predicts label t + 1. Labels of
                -100 are left out of the loss, and those that padding would predict. Of packed sequences the last token
                predicts the first of the next one, unless that has the label -100.
            logits_to_keep: tokens whose logits are computed; 0 is all. A number n: the last n. Indices: `[M]`, or
                `[B, M]` for each batch row. A bool mask `[B, T]`: logits are then `[tokens, vocab_size]`.
            skip_logits: with labels, return no logits. The memory that training takes then does not grow with
                T × vocab_size, unless all logits are needed for the loss, as above.
            kwargs: `num_items_in_batch`, a divisor of the summed loss in place of the number of labels (0 counts as
                1); `shift_labels`, labels that are already shifted, which a rank of sequence parallelism must give;
                `ignore_index` in place of -100; and arguments of `LightningModel`.
            others: see `LightningModel.forward`.

        Returns:
            Logits `[B, T, vocab_size]`, None with `skip_logits`; with labels, the mean loss in nats per token (0 with
            gradients of 0 if all labels are ignored); the cache; and, if `states` are given, the states after the
            tokens.

        Raises:
            TypeError, ValueError: see `LightningModel.forward`; ValueError also for labels with only some logits, and
                for `skip_logits` without labels.
            IndexError: a label on a CPU is out of range.
        """
        for_loss: dict[str, Any] = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        has_labels = labels is not None or for_loss.get("shift_labels") is not None
        self._check_labels(has_labels, for_loss, logits_to_keep, skip_logits)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=resolve_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            seq_idx=seq_idx,
            states=states,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        shape = outputs.last_hidden_state.shape[:2]
        if (shifted := for_loss.get("shift_labels")) is not None and shifted.shape == (shape.numel(),):
            shifted = for_loss["shift_labels"] = shifted.unflatten(0, shape)
        for name, given in (("labels", labels), ("shift_labels", shifted)):
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} must be [B, T] = {list(shape)}, got shape {tuple(given.shape)}")
        if has_labels and attention_mask is not None:
            labels = _without_padding(labels, attention_mask, for_loss)
        hidden_states = _select_tokens(outputs.last_hidden_state, logits_to_keep)
        in_chunks = has_labels and self._has_loss_in_chunks()
        logits = None if skip_logits and in_chunks else self.compute_logits(hidden_states)
        loss = None
        if has_labels:
            given = _loss_arguments(labels, **for_loss)
            if in_chunks:
                loss = _loss_in_chunks(hidden_states, self.lm_head.weight, labels, **given)
            elif self.config.invariant and self.loss_function is ForCausalLMLoss:
                loss = _loss_of_logits(cast(Tensor, logits), labels, **given)
            else:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **given)
        returned: dict[str, Any] = {CACHE: outputs.cache}
        return LightningOutput(
            loss=loss,
            logits=None if skip_logits else cast(Any, logits),
            hidden_states=outputs.hidden_states,
            states=outputs.states,
            **returned,
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits `[..., vocab_size]` of normalised hidden states `[..., W]`, as `forward` computes them."""
        with invariant_functions(hidden_states, self.config.invariant):
            return self.lm_head(hidden_states)

    def _check_labels(
        self, has_labels: bool, for_loss: dict[str, Any], logits_to_keep: int | Tensor, skip_logits: bool
    ) -> None:
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be at least 0, got {logits_to_keep}")
        if has_labels and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need all logits: leave logits_to_keep out")
        if skip_logits and not has_labels:
            raise ValueError("skip_logits needs labels: without them the logits are the only result")
        if has_labels and self.model.sequence_parallel is not None and for_loss.get("shift_labels") is None:
            raise ValueError("with sequence parallelism give shift_labels: the next rank holds the last token's label")

    def _has_loss_in_chunks(self) -> bool:
        """True if the loss is the cross-entropy of a plain linear layer, which then need not be called.

        The length of its chunks depends on the number of tokens, as do then the bits of their products.
        """
        return not self.config.invariant and is_plain_linear(self.lm_head) and self.loss_function is ForCausalLMLoss

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; `cache` or `past_key_values` continues an earlier call.

        Raises:
            ValueError: the text has no token that the cache has not read, or `use_cache=False` is given with a cache.
        """
        cache = resolve_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        given = next((kwargs[name] for name in ("inputs", "input_ids") if name in kwargs), args[0] if args else None)
        if cache is not None and cache.length and isinstance(given, Tensor) and given.shape[-1] <= cache.length:
            raise ValueError(
                f"the text has {given.shape[-1]} columns, and the cache has read {cache.length}: give the text with "
                "tokens that the cache has not read"
            )
        mixin: Any = super()  # typed for a protocol that transformers' own models do not satisfy
        return mixin.generate(*args, **kwargs | ({} if cache is None else {CACHE: cache}))

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Inputs of a forward pass, with the cache by both names: PEFT looks for `past_key_values`."""
        mixin: Any = super()
        inputs = mixin.prepare_inputs_for_generation(*args, **kwargs)
        return inputs if inputs.get(CACHE) is None else inputs | {"past_key_values": inputs[CACHE]}

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Give transformers' generate() a `LightningCache`, the only cache of this model."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation must be None, got {generation_config.cache_implementation!r}: this model's "
                "cache is a LightningCache"
            )
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE)
        if isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask[:, -1:] == 0).any()):
            raise ValueError("attention_mask marks the last column as padding: pad texts to continue on the left")
        if cache is not None and (generation_config.num_beams or 1) > 1:
            raise ValueError("beams go with no cache of yours: it would hold other texts than the one returned")
        if not generation_config.use_cache and model_kwargs.get(CACHE) is not None:
            raise ValueError("use_cache=False contradicts a cache: give one of them")
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = LightningCache(self.config.num_hidden_layers)
        else:
            mixin: Any = super()
            mixin._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


class LightningForSequenceClassification(GenericForSequenceClassification, LightningPreTrainedModel):
    """Classifier of texts: logits `[B, num_labels]` from the last token.

    It is the last column that `attention_mask` does not mark as padding. Without a mask it is the last token that is
    not `pad_token_id`; a configuration without one needs a mask for several texts.

    Example:
        >>> import torch
        >>> from lightning_attention.models import LightningConfig, LightningForSequenceClassification
        >>> config = LightningConfig.from_size("demo", vocab_size=256, num_labels=3, pad_token_id=0)
        >>> LightningForSequenceClassification(config)(torch.randint(1, 256, (2, 10))).logits.shape
        torch.Size([2, 3])
    """

    accepts_loss_kwargs = False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LightningCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Compute logits, and the loss if labels `[B]`, or `[B, num_labels]`, are given.

        Args:
            others: see `LightningModel.forward`.

        Raises:
            ValueError: a text has no token; or there are several texts, and neither a mask nor `pad_token_id`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        is_token = self._is_token(hidden_states, input_ids, attention_mask)
        columns = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        last = torch.where(is_token, columns, -1).amax(dim=1)
        if not torch.compiler.is_compiling() and bool((last < 0).any()):
            raise ValueError("every text must have a token that is not padding")
        with invariant_functions(hidden_states, self.config.invariant):
            logits = self.score(hidden_states[torch.arange(len(last), device=last.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        returned: dict[str, Any] = {CACHE: outputs.cache}
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **returned
        )

    def _is_token(self, hidden_states: Tensor, input_ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """`[B, T]` bool, false in the padding."""
        if mask is not None:
            return mask[:, mask.shape[1] - hidden_states.shape[1] :].to(hidden_states.device) != 0
        pad_token_id = self.config.pad_token_id
        if input_ids is not None and pad_token_id is not None:
            return (input_ids != pad_token_id).to(hidden_states.device)
        if len(hidden_states) > 1:
            raise ValueError("several texts need an attention_mask, or tokens and a pad_token_id, to find their ends")
        return torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)


class LightningForTokenClassification(GenericForTokenClassification, LightningPreTrainedModel):
    """Classifier of tokens: logits `[B, T, num_labels]`."""

    accepts_loss_kwargs = False

    @wraps(GenericForTokenClassification.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with invariant_functions(self.score.weight, self.config.invariant):
            return super().forward(*args, **kwargs)


class LightningForQuestionAnswering(GenericForQuestionAnswering, LightningPreTrainedModel):
    """Extractive question answering: logits `[B, T]` of the first and of the last token of the answer."""

    accepts_loss_kwargs = False

    @wraps(GenericForQuestionAnswering.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with invariant_functions(self.qa_outputs.weight, self.config.invariant):
            return super().forward(*args, **kwargs)


def _without_padding(labels: Tensor | None, mask: Tensor, for_loss: dict[str, Any]) -> Tensor | None:
    """Ignore the labels that padding would predict: return `labels` without them, and change `shift_labels`."""
    ignored = for_loss.get("ignore_index", IGNORED)
    if (shifted := for_loss.get("shift_labels")) is not None:
        is_padding = mask[:, mask.shape[1] - shifted.shape[1] :].to(shifted.device) == 0
        for_loss["shift_labels"] = shifted.masked_fill(is_padding, ignored)
    if labels is None:
        return None
    is_padding = mask[:, mask.shape[1] - labels.shape[1] :].to(labels.device) == 0
    return labels.masked_fill(F.pad(is_padding, (1, 0))[:, :-1], ignored)


def _loss_arguments(
    labels: Tensor | None,
    *,
    num_items_in_batch: int | Tensor | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = IGNORED,
) -> dict[str, Any]:
    """Arguments of the loss function, with a divisor that is at least 1."""
    count = num_items_in_batch
    if count is None:
        predicted = cast(Tensor, labels)[..., 1:] if shift_labels is None else shift_labels
        count = (predicted != ignore_index).sum()
    return {
        "num_items_in_batch": count + (count == 0),
        "shift_labels": shift_labels,
        "ignore_index": ignore_index,
    }


def _loss_in_chunks(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    *,
    num_items_in_batch: int | Tensor,
    shift_labels: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """`ForCausalLMLoss` of the logits of a linear layer, without all logits."""
    x, expected = hidden_states.flatten(0, -2), _expected(labels, shift_labels, ignore_index, hidden_states.device)
    return linear_cross_entropy(x, weight, expected, ignore_index=ignore_index, reduction="sum") / num_items_in_batch


def _loss_of_logits(
    logits: Tensor,
    labels: Tensor | None,
    *,
    num_items_in_batch: int | Tensor,
    shift_labels: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """`ForCausalLMLoss` of logits, in float64 if they are."""
    x = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    expected = _expected(labels, shift_labels, ignore_index, logits.device)
    return F.cross_entropy(x, expected, ignore_index=ignore_index, reduction="sum") / num_items_in_batch


def _expected(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int, device: torch.device) -> Tensor:
    """`[B T]`, the token that each token predicts."""
    if shift_labels is None:
        shift_labels = F.pad(cast(Tensor, labels), (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.flatten().to(device)


def _select_tokens(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dim() == 2 and logits_to_keep.dtype != torch.bool:
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
    return hidden_states[logits_to_keep] if logits_to_keep.dim() == 2 else hidden_states[:, logits_to_keep]
