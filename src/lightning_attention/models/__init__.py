"""Hugging Face models with lightning attention. Requires `lightning-attention[models]`."""

from ..extras import require

require("models", "transformers", "safetensors")

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from .cache import LightningCache  # noqa: E402
from .compilation import compile_layers  # noqa: E402
from .configuration import SIZES, LightningConfig  # noqa: E402
from .float8 import use_float8  # noqa: E402
from .heads import (  # noqa: E402
    LightningForCausalLM,
    LightningForQuestionAnswering,
    LightningForSequenceClassification,
    LightningForTokenClassification,
)
from .mixers import LinearAttention, register_attention  # noqa: E402
from .model import LightningModel  # noqa: E402

AutoConfig.register(LightningConfig.model_type, LightningConfig, exist_ok=True)
AutoModel.register(LightningConfig, LightningModel, exist_ok=True)
AutoModelForCausalLM.register(LightningConfig, LightningForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(LightningConfig, LightningForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(LightningConfig, LightningForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(LightningConfig, LightningForQuestionAnswering, exist_ok=True)
# By this name transformers' Trainer knows that it has to shift labels for `label_smoothing_factor`.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[LightningConfig.model_type] = LightningForCausalLM.__name__

__all__ = [
    "SIZES",
    "LightningCache",
    "LightningConfig",
    "LightningForCausalLM",
    "LightningForQuestionAnswering",
    "LightningForSequenceClassification",
    "LightningForTokenClassification",
    "LightningModel",
    "LinearAttention",
    "compile_layers",
    "register_attention",
    "use_float8",
]
