"""Training of language models on text files. Needs `lightning-attention[train]`."""

from ..extras import require

require("train", "transformers", "safetensors", "accelerate", "tokenizers", "jinja2", "matplotlib", "numpy", "filelock")

from .corpus import Corpus, PackedDataset  # noqa: E402
from .evaluation import Evaluation, evaluate  # noqa: E402
from .options import TrainingOptions  # noqa: E402
from .segments import segmented_loss  # noqa: E402
from .signals import Interrupted  # noqa: E402
from .tokenizer import byte_tokenizer, load_tokenizer  # noqa: E402
from .train import train  # noqa: E402

__all__ = [
    "Corpus",
    "Evaluation",
    "Interrupted",
    "PackedDataset",
    "TrainingOptions",
    "byte_tokenizer",
    "evaluate",
    "load_tokenizer",
    "segmented_loss",
    "train",
]
