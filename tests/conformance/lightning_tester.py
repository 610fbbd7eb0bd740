"""Tester of our models for transformers' own tests; `run.py` puts it into their folder `tests/models/lightning/`."""

import unittest
from unittest.mock import patch

from transformers.models.auto import modeling_auto

from lightning_attention import models
from lightning_attention.models import LightningCache, LightningConfig, LightningForCausalLM, LightningModel

from ...causal_lm_tester import CausalLMModelTest, CausalLMModelTester

# The suites know by these tables which labels a class takes, and whether it has a loss.
HEADS = {
    "MODEL_MAPPING_NAMES": "LightningModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "LightningForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "LightningForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "LightningForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "LightningForQuestionAnswering",
}


class LightningModelTester(CausalLMModelTester):
    config_class = LightningConfig
    base_model_class = LightningModel
    causal_lm_class = LightningForCausalLM
    sequence_classification_class = models.LightningForSequenceClassification
    token_classification_class = models.LightningForTokenClassification
    question_answering_class = models.LightningForQuestionAnswering


class LightningModelTest(CausalLMModelTest, unittest.TestCase):
    model_tester_class = LightningModelTester
    # As Mamba2's tester: no attention weights exist that could be returned.
    has_attentions = False

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        for table, name in HEADS.items():
            cls.enterClassContext(patch.dict(getattr(modeling_auto, table), {LightningConfig.model_type: name}))

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config) -> None:
        """Check lightning layers. MiniMax's tester has its own check too: transformers' wants convolution states."""
        assert isinstance(past_key_values, LightningCache)
        assert past_key_values.get_seq_length() == seq_length
        states = [layer.recurrent_states[0] for layer in past_key_values.layers]
        shapes = [(batch_size, *config.layer_state_shape(i)) for i in range(config.num_hidden_layers)]
        assert [tuple(state.shape) for state in states] == shapes
