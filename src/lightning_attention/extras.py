"""Check of the packages that parts of the library need in addition to PyTorch."""

from importlib.util import find_spec


def require(extra: str, *modules: str) -> None:
    """Raise an ImportError that names the extra if one of the modules is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"{', '.join(missing)} not installed: run pip install 'lightning-attention[{extra}]'", name=missing[0]
        )
