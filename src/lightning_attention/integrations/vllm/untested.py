"""What a vLLM that the plug-in was not run with imports in place of the model: other models are served as ever."""

from vllm import __version__

from . import TESTED

raise ImportError(
    f"lightning-attention was tested with vLLM {TESTED}.*, this is {__version__}. vLLM's interfaces for models with "
    "states change between releases, and a change may give wrong text: install a tested one"
)
