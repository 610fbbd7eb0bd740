"""Text from a trained model. Needs `lightning-attention[models]`."""

from ..extras import require

require("models", "transformers", "safetensors", "tokenizers")

from .generate import SamplingOptions, load, stream  # noqa: E402

__all__ = ["SamplingOptions", "load", "stream"]
