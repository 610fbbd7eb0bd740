"""An OpenAI-compatible server. Needs `lightning-attention[serve]`."""

from ..extras import require

require("serve", "fastapi", "jinja2", "prometheus_client", "uvicorn")

from .app import create_app  # noqa: E402
from .options import ServerOptions  # noqa: E402
from .server import bind, serve  # noqa: E402

__all__ = ["ServerOptions", "bind", "create_app", "serve"]
