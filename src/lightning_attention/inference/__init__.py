"""Text generation with a trained model, for one prompt or many. Needs `lightning-attention[models]`."""

from ..extras import require

require("models", "transformers", "safetensors", "tokenizers")

from .chat import ChatPrompts, ConversationError  # noqa: E402
from .conversation import Conversation  # noqa: E402
from .engine import Engine  # noqa: E402
from .generate import encode, load, stream  # noqa: E402
from .outputs import Completion, FinishReason, Output, TokenLogprobs  # noqa: E402
from .pool import PoolExhaustedError, StatePool  # noqa: E402
from .sampling import SamplingOptions  # noqa: E402

__all__ = [
    "ChatPrompts",
    "Completion",
    "Conversation",
    "ConversationError",
    "Engine",
    "FinishReason",
    "Output",
    "PoolExhaustedError",
    "SamplingOptions",
    "StatePool",
    "TokenLogprobs",
    "encode",
    "load",
    "stream",
]
