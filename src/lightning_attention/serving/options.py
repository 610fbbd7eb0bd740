"""Options of the server."""

from dataclasses import dataclass

from ..models.tokenization import well_formed


@dataclass(frozen=True)
class ServerOptions:
    """Options of the server.

    Attributes:
        model: name of the model for clients.
        max_requests: choices that are generated at the same time.
        max_waiting: choices that wait for a slot, at most; further requests are refused.
        max_tokens: new tokens per choice, at most.
        max_length: tokens of a prompt and its choice, at most; None for the limit of the model alone.
        prefix_slots: states in the prefix cache.
        api_key: key that clients must send; None for no check.
        hosts: accepted host names in requests; None for all.
        max_body_bytes: size of a request, at most.
        chat_template: Jinja template instead of the checkpoint's.

    Raises:
        ValueError: a number is out of range, or a name is empty.

    Example:
        >>> from lightning_attention.serving import ServerOptions
        >>> ServerOptions("demo", max_requests=8).max_waiting
        256
    """

    model: str
    max_requests: int = 64
    max_waiting: int = 256
    max_tokens: int = 16_384
    max_length: int | None = None
    prefix_slots: int = 16
    api_key: str | None = None
    hosts: tuple[str, ...] | None = None
    max_body_bytes: int = 16 << 20
    chat_template: str | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("max_requests", 1),
            ("max_waiting", 0),
            ("max_tokens", 1),
            ("max_length", 2),
            ("prefix_slots", 0),
            ("max_body_bytes", 1),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not self.model or well_formed(self.model) != self.model:
            raise ValueError(f"model must be a name in UTF-8 that is not empty, got {self.model!r}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key must consist of printable ASCII characters, since it is sent in a header")
