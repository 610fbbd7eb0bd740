"""Metrics of the server, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .choices import Choice, Piece

PREFIX = "lightning_attention"
FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            f"{PREFIX}_requests", "HTTP requests, by route and status.", ["route", "status"], registry=registry
        )
        self.prompt_tokens = Counter(f"{PREFIX}_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated_tokens = Counter(f"{PREFIX}_generated_tokens", "Tokens generated.", registry=registry)
        self.first_token = Histogram(
            f"{PREFIX}_time_to_first_token_seconds",
            "Seconds from the arrival of a request to the first token of a choice.",
            buckets=FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self.token = Histogram(
            f"{PREFIX}_time_per_token_seconds",
            "Mean seconds between the tokens of a choice.",
            buckets=TOKEN_SECONDS,
            registry=registry,
        )

    def add_gauge(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        """Add a number that is read when metrics are."""
        Gauge(f"{PREFIX}_{name}", documentation, registry=self.registry).set_function(value)

    def count(self, choice: Choice, piece: Piece) -> None:
        """Count the tokens of a piece, and the times of its choice."""
        self.generated_tokens.inc(piece.num_tokens)
        if piece.num_tokens and choice.num_tokens == 1:
            self.first_token.observe(choice.first_at - choice.arrived)
        if piece.finish_reason is not None and choice.num_tokens > 1:
            self.token.observe((choice.last_at - choice.first_at) / (choice.num_tokens - 1))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
