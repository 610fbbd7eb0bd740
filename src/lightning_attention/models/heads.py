"""What is built on `LightningModel`: the language model, and transformers' generic heads for classification."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .cache import CACHE, LightningCache, one_cache
from .configuration import LightningConfig
from .model import LightningModel, LightningPreTrainedModel

# What `transformers.loss.ForCausalLMLoss` takes beside logits, labels and vocab_size.
LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")
IGNORED = -100  # the label of a token that is not to be predicted


@dataclass
class LightningOutput(CausalLMOutputWithPast):
    """transformers' output, and `states` as in `LightningModelOutput`."""

    states: tuple[Tensor, ...] | None = None

    if CACHE == "past_key_values":

        @property
        def cache(self) -> Cache | None:
            return self.past_key_values


class LightningForCausalLM(LightningPreTrainedModel, GenerationMixin):
    """The language model: `LightningModel`, and logits over the vocabulary."""

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
        **kwargs: Any,
    ) -> LightningOutput:
        """
        Args:
            labels: `[B, T]` tokens, usually `input_ids`: they are shifted here, so that token t predicts t + 1. -100
                is left out of the loss.
            logits_to_keep: which logits to compute; 0 is all. A number: those of the last so many tokens. Indices:
                `[M]`, or `[B, M]` for every batch row. A bool mask `[B, T]`: logits are then `[tokens, vocab_size]`.
            kwargs: `num_items_in_batch`, by which the sum of losses is divided instead of the number of labels; 0
                counts as 1; `shift_labels`, labels that are shifted already, which a rank of sequence parallelism
                gives; `ignore_index` instead of -100; and what `LightningModel` takes.
            others: as for `LightningModel`.

        Returns:
            Logits `[B, T, vocab_size]`, the mean loss in nats a token where labels are given, the cache, and the states
            after these tokens where those before were given. Where all labels are ignored, the loss and its gradients
            are 0.

        Raises:
            TypeError, ValueError: as `LightningModel`; ValueError also for labels with only some of the logits.
        """
        for_loss = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        has_labels = labels is not None or for_loss.get("shift_labels") is not None
        if has_labels and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need all logits: leave logits_to_keep out")
        if has_labels and self.model.sequence_parallel is not None and for_loss.get("shift_labels") is None:
            raise ValueError("with sequence parallelism give shift_labels: the next rank holds the last token's label")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
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
        logits = self.lm_head(_kept(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if has_labels:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **_divided(labels, **for_loss)
            )
        returned: dict[str, Any] = {CACHE: outputs.cache}
        return LightningOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, states=outputs.states, **returned
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`; the cache of an earlier call as `cache` or `past_key_values`."""
        cache = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        mixin: Any = super()  # transformers types its methods for a protocol that its own models do not satisfy
        return mixin.generate(*args, **kwargs | ({} if cache is None else {CACHE: cache}))

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """transformers' generate() calls this; the cache of this model is `LightningCache` and no other."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation must be None, got {generation_config.cache_implementation!r}: this model's "
                "cache is a LightningCache, whose size is static"
            )
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = LightningCache(self.config.num_hidden_layers)
        else:
            mixin: Any = super()
            mixin._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


class LightningForSequenceClassification(GenericForSequenceClassification, LightningPreTrainedModel):
    """A label for every text, from its last token that is not `pad_token_id`."""

    accepts_loss_kwargs = False


class LightningForTokenClassification(GenericForTokenClassification, LightningPreTrainedModel):
    """A label for every token."""

    accepts_loss_kwargs = False


class LightningForQuestionAnswering(GenericForQuestionAnswering, LightningPreTrainedModel):
    """First and last token of an answer."""

    accepts_loss_kwargs = False


def _divided(
    labels: Tensor | None,
    *,
    num_items_in_batch: int | Tensor | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = IGNORED,
) -> dict[str, Any]:
    """Arguments of the loss function, with a number of labels to divide by that is not 0."""
    count = num_items_in_batch
    if count is None:
        predicted = cast(Tensor, labels)[..., 1:] if shift_labels is None else shift_labels
        count = (predicted != ignore_index).sum()
    return {
        "num_items_in_batch": count + (count == 0),
        "shift_labels": shift_labels,
        "ignore_index": ignore_index,
    }


def _kept(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dim() == 2 and logits_to_keep.dtype != torch.bool:
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
    return hidden_states[logits_to_keep] if logits_to_keep.dim() == 2 else hidden_states[:, logits_to_keep]
