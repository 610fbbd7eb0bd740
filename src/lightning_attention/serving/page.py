"""The chat page, with headers that let it run its own scripts and styles and nothing else."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

from .errors import ApiError

PAGE = Path(__file__).with_name("page.html")


def page_response(file: Path = PAGE) -> Response:
    """Response with the page.

    Raises:
        ApiError: there is no page.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise ApiError(404, "this server has no page") from None
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(content, 'script')}",
            f"style-src {_hashes(content, 'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)


def _hashes(content: bytes, element: str) -> str:
    """Hashes of the inline elements, for the policy."""
    pattern = rf"<{element}\b[^>]*>(.*?)</{element}>".encode()
    digests = (hashlib.sha256(found).digest() for found in re.findall(pattern, content, re.S | re.I))
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests) or "'none'"
