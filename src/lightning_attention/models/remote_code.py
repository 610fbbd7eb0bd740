"""What makes a saved model open by its path with `trust_remote_code=True`, before this package was imported.

`config.json` names the classes of a module that lies beside it (`auto_map`). The module holds no model code: it imports
the classes of the installed package, so that they are the same objects, and registers them.
"""

from collections.abc import Mapping
from typing import Any

from ..paths import PathLike, to_path

MODULE = "modeling_lightning"
AUTO_MAP = {
    auto_class: f"{MODULE}.{name}"
    for auto_class, name in {
        "AutoConfig": "LightningConfig",
        "AutoModel": "LightningModel",
        "AutoModelForCausalLM": "LightningForCausalLM",
        "AutoModelForSequenceClassification": "LightningForSequenceClassification",
        "AutoModelForTokenClassification": "LightningForTokenClassification",
        "AutoModelForQuestionAnswering": "LightningForQuestionAnswering",
    }.items()
}
SOURCE = '''"""Opens this model with the installed package lightning-attention, which has its code."""

try:
    from lightning_attention.models import *
except ImportError as error:
    raise ImportError(
        f"this model needs lightning-attention, run pip install 'lightning-attention[models]' ({error})"
    ) from error
'''


def is_ours(cls: type) -> bool:
    """Whether a class is of this package, and not derived from one elsewhere."""
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def with_auto_map(auto_map: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `auto_map` of a configuration: what it had, with the classes of this package in their places.

    A configuration from the Hub may name them as `repository--module.Class`.
    """
    return dict(auto_map or {}) | AUTO_MAP


def write_remote_code(folder: PathLike) -> None:
    """Write the module that `AUTO_MAP` names.

    Raises:
        TypeError: `folder` is no path.
        OSError: the file cannot be written.
    """
    (to_path(folder, "folder") / f"{MODULE}.py").write_text(SOURCE)
