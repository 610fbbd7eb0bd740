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
