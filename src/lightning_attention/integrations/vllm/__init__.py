"""A plug-in by which vLLM serves our models: vLLM finds it by its entry point, and nothing has to be imported.

`register` tells vLLM the names of configuration and model. The model itself, `model.py`, is imported by the processes
of vLLM that load one.
"""

import logging

TESTED = "0.32"  # release series of vLLM whose interfaces the plug-in was run with


def register() -> None:
    """Let vLLM find `LightningForCausalLM`. Every process of vLLM calls this, also for models of others."""
    from vllm import ModelRegistry, __version__

    try:
        import lightning_attention.models  # noqa: F401  # registers the configuration with transformers
    except ImportError as error:
        logging.getLogger(__name__).warning("vLLM can serve no models of lightning-attention: %s", error)
        return
    module = "model" if __version__.startswith(f"{TESTED}.") else "untested"
    ModelRegistry.register_model("LightningForCausalLM", f"{__name__}.{module}:LightningForCausalLM")
