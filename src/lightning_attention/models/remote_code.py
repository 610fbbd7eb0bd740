"""Loading a saved model by its path with `trust_remote_code=True`, without importing this package first.

`config.json` names the classes of a module in the same folder (`auto_map`). The module contains no model code: it
imports the installed package, so the classes are the same objects, and registers them.
"""

from collections.abc import Mapping
from typing import Any

from ..paths import PathLike, to_path

MODULE = "modeling_lightning"
AUTO_MAP = {
    "AutoConfig": f"{MODULE}.LightningConfig",
    "AutoModel": f"{MODULE}.LightningModel",
    "AutoModelForCausalLM": f"{MODULE}.LightningForCausalLM",
    "AutoModelForSequenceClassification": f"{MODULE}.LightningForSequenceClassification",
    "AutoModelForTokenClassification": f"{MODULE}.LightningForTokenClassification",
    "AutoModelForQuestionAnswering": f"{MODULE}.LightningForQuestionAnswering",
}
SOURCE = '''"""Loads this model with the installed package lightning-attention, which contains its code."""

try:
    from lightning_attention.models import *
except ImportError as error:
    raise ImportError(
        f"this model needs lightning-attention, run pip install 'lightning-attention[models]' ({error})"
    ) from error
'''


def is_ours(cls: type) -> bool:
    """True if a class is defined in this package, rather than derived from one elsewhere."""
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def with_auto_map(auto_map: Mapping[str, Any] | None) -> dict[str, Any]:
    """Add the classes of this package to the `auto_map` of a configuration.

    A configuration from the Hub may name them as `repository--module.Class`; those entries are replaced.
    """
    return dict(auto_map or {}) | AUTO_MAP


def write_remote_code(folder: PathLike) -> None:
    """Write the module that `AUTO_MAP` names.

    Raises:
        TypeError: `folder` is not a path.
        OSError: the file cannot be written.
    """
    (to_path(folder, "folder") / f"{MODULE}.py").write_text(SOURCE)
