"""Stand-in for tests/causal_lm_tester.py, which transformers' source distribution lacks: only `ModelTesterMixin`."""

from typing import Any

import torch

from .generation.test_utils import GenerationTesterMixin  # pyright: ignore[reportMissingImports]
from .test_modeling_common import (  # pyright: ignore[reportMissingImports]
    ModelTesterMixin,
    ids_tensor,
    torch_device,
)


class CausalLMModelTester:
    """Small configuration and right-padded inputs, like transformers' class of this name."""

    config_class: Any
    layer_pattern: str | None

    batch_size = 13
    seq_length = 7
    is_training = True
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 2

    def __init__(self, parent) -> None:
        self.parent = parent

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=32,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            layer_pattern=self.layer_pattern,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids).tril()}


class CausalLMModelTest(ModelTesterMixin, GenerationTesterMixin):
    def setUp(self) -> None:
        self.model_tester = tester = self.model_tester_class(self)
        self.all_model_classes = (
            tester.base_model_class,
            tester.causal_lm_class,
            tester.sequence_classification_class,
            tester.token_classification_class,
            tester.question_answering_class,
        )

    def test_model(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        output = self.model_tester.base_model_class(config).to(torch_device).eval()(**inputs)
        assert output.last_hidden_state.shape == (*inputs["input_ids"].shape, config.hidden_size)
