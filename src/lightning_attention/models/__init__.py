"""Language models with lightning attention, as Hugging Face models. Needs `lightning-attention[models]`."""

from ..extras import require

require("models", "transformers", "safetensors")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

from .cache import LightningCache  # noqa: E402
from .configuration import SIZES, LightningConfig  # noqa: E402
from .model import LightningForCausalLM, LightningModel  # noqa: E402

AutoConfig.register(LightningConfig.model_type, LightningConfig, exist_ok=True)
AutoModel.register(LightningConfig, LightningModel, exist_ok=True)
AutoModelForCausalLM.register(LightningConfig, LightningForCausalLM, exist_ok=True)

__all__ = ["SIZES", "LightningCache", "LightningConfig", "LightningForCausalLM", "LightningModel"]
