"""Tester of our models for transformers' own tests; `run.py` copies it to their folder `tests/models/lightning/`."""

import unittest
from unittest.mock import patch

import torch
from transformers.cache_utils import LinearAttentionLayer
from transformers.models.auto import modeling_auto

from lightning_attention import models
from lightning_attention.models import LightningCache, LightningConfig, LightningForCausalLM, LightningModel
from lightning_attention.models.cache import KeyValueLayer

from ...causal_lm_tester import CausalLMModelTest, CausalLMModelTester  # pyright: ignore[reportMissingImports]

# Tables in which the tests look up the labels and the loss of a class.
HEADS = {
    "MODEL_MAPPING_NAMES": "LightningModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "LightningForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "LightningForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "LightningForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "LightningForQuestionAnswering",
}


@unittest.skip(
    "Rotary positions are default or linear alone, and of softmax attention: see tests/models/test_softmax.py."
)
def of_ours(self) -> None: ...


class LightningModelTester(CausalLMModelTester):
    config_class = LightningConfig
    base_model_class = LightningModel
    causal_lm_class = LightningForCausalLM
    sequence_classification_class = models.LightningForSequenceClassification
    token_classification_class = models.LightningForTokenClassification
    question_answering_class = models.LightningForQuestionAnswering
    layer_pattern: str | None = None

    def prepare_config_and_inputs(self):
        """transformers' inputs, padded on the left: generate() refuses padding on the right."""
        config, input_ids, token_type_ids, mask, *labels = super().prepare_config_and_inputs()
        return config, input_ids, token_type_ids, None if mask is None else mask.flip(-1), *labels


class LightningHybridTester(LightningModelTester):
    """One layer of linear attention, one of softmax attention."""

    layer_pattern = "1:1"


class LightningModelTest(CausalLMModelTest, unittest.TestCase):
    model_tester_class = LightningModelTester
    # As in Mamba2's tester, since there are no attention weights.
    has_attentions = False
    # They set parameters of every kind, also those of models without rotary positions, which we refuse by name.
    test_model_rope_scaling_from_config_0_linear = of_ours
    test_model_rope_scaling_from_config_1_dynamic = of_ours
    test_model_rope_scaling_from_config_2_yarn = of_ours
    test_model_rope_with_partial_rotation = of_ours

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        for table, name in HEADS.items():
            cls.enterClassContext(patch.dict(getattr(modeling_auto, table), {LightningConfig.model_type: name}))

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config) -> None:
        """Check the states; transformers' own check expects convolution states, so MiniMax's tester has another too."""
        assert isinstance(past_key_values, LightningCache)
        assert past_key_values.get_seq_length() == seq_length
        for i, layer in enumerate(past_key_values.layers):
            if isinstance(layer, KeyValueLayer):
                kept = layer.key_values
                padding = 0 if past_key_values.padding is None else past_key_values.padding[:, 0]
                assert torch.equal(kept.lengths.cpu(), torch.full((batch_size,), seq_length) - padding)
                assert kept.keys.shape[2:] == (
                    config.num_attention_heads,
                    config.hidden_size // config.num_attention_heads,
                )
            else:
                assert isinstance(layer, LinearAttentionLayer)
                state = layer.recurrent_states[0]
                assert state is not None
                assert state.shape == (batch_size, *config.layer_state_shape(i))


@unittest.skip("They export padded inputs with a cache; keys and values are packed by values, which a graph has not.")
def with_a_cache(self) -> None: ...


class LightningHybridTest(LightningModelTest):
    model_tester_class = LightningHybridTester
    test_torch_export_static = with_a_cache
    test_torch_export_dynamic = with_a_cache
    test_torch_export_generate_static = with_a_cache
    test_torch_export_generate_dynamic = with_a_cache
