"""Initialisation, saving and loading, as all models share them."""

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import CONFIG_NAME

from ..nn import LRPE
from ..nn.attention import Decay
from ..nn.feature_maps import RandomFeatures, RandomFourierFeatures
from ..paths import to_path
from .configuration import LightningConfig
from .remote_code import is_ours


class LightningPreTrainedModel(PreTrainedModel):
    """Initialisation, saving and loading of all models with a `LightningConfig`."""

    config: LightningConfig
    config_class = LightningConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LightningDecoderLayer"]
    # No assisted generation: the state cannot be rolled back.
    _is_stateful = True
    # Means generate() with transformers' static cache, which this model does not take; torch.compile(fullgraph=True)
    # works.
    _can_compile_fullgraph = False

    if TYPE_CHECKING:
        # transformers wraps these methods in a decorator that hides their types.
        def to(self, *args: Any, **kwargs: Any) -> Self: ...  # pyright: ignore[reportIncompatibleVariableOverride]
        def cuda(self, *args: Any) -> Self: ...  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Save the source of a derived class with it; classes of this package need none, see `remote_code`."""
        if not is_ours(cls):
            super().register_for_auto_class(auto_class)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights from a normal distribution; set other parameters and constants as the configuration says."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if (bias := getattr(module, "bias", None)) is not None:
                init.zeros_(bias)
        elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            if (bias := getattr(module, "bias", None)) is not None:
                init.zeros_(bias)
        elif isinstance(module, LRPE):
            init.copy_(module.theta, LRPE.initial_theta(*module.theta.shape, device=module.theta.device))
        elif isinstance(module, Decay):
            init.copy_(module.log_decay, module.initial_log_decay(module.log_decay.device))
        elif isinstance(module, RandomFeatures):
            init.copy_(module.directions, module.draw().to(module.directions.device))
            if isinstance(module, RandomFourierFeatures):
                init.ones_(module.sigma)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with every weight: a head tied to the embedding once, any other head itself."""
        if (head := self.get_output_embeddings()) is not None:
            is_tied = getattr(head, "weight", None) is self.get_input_embeddings().weight
            self.config.tie_word_embeddings = is_tied
            self._keys_to_ignore_on_save = list(self._tied_weights_keys or ()) if is_tied else None
        super().save_pretrained(save_directory, *args, **kwargs)
        share_mode(to_path(save_directory, "save_directory"))

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize as transformers does.

        Raises:
            ValueError: the vocabulary would be too small for a special token of the configuration.
        """
        if new_num_tokens is not None:
            self.config.check_token_ids(new_num_tokens)
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


def share_mode(folder: Path) -> None:
    """Give weights the file mode of config.json: safetensors makes them readable by their owner alone."""
    config = folder / CONFIG_NAME
    for weights in folder.glob("*model*.safetensors") if config.is_file() else []:
        weights.chmod(stat.S_IMODE(config.stat().st_mode))
