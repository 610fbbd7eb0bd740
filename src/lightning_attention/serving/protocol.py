"""Requests of OpenAI's API, as far as this server answers them.

A field that would change the answer and is not supported is refused by name, and so is an unknown one. Values of such
fields that change nothing (`null`, 0, an empty list, ...) are accepted.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ..inference import SamplingOptions

MAX_CHOICES, MAX_STOPS = 128, 4
COMPLETION_TOKENS, CHAT_TOKENS = 16, 1024  # default numbers of new tokens
# Fields without support, and the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "min_p": (None, 0),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
# Fields about the caller, which change nothing.
ABOUT_CALLER = {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "user"}
MESSAGE_NEUTRAL = {"annotations", "audio", "function_call", "refusal", "tool_calls"}


def unsupported(param: str, message: str) -> PydanticCustomError:
    """Error for a field whose value is not supported."""
    return PydanticCustomError("unsupported", "{message}", {"param": param, "message": message})  # type: ignore[arg-type]


def as_prompts(value: Any) -> list[str | list[int]]:
    """Turn a prompt (a text, texts, token ids, or lists of token ids) into a list of texts and lists of token ids."""
    prompts = [value] if isinstance(value, str) or _are_tokens(value) else value
    if not isinstance(prompts, list) or not prompts:
        raise unsupported("prompt", "prompt must be a text, texts, token ids, or lists of token ids")
    for prompt in prompts:
        if not isinstance(prompt, str) and not _are_tokens(prompt):
            raise unsupported("prompt", "prompt must hold texts, or lists of token ids, none of them empty")
    return prompts


def as_stops(value: Any) -> list[str]:
    """Turn a stop text, or a list of stop texts, into a list."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise unsupported("stop", "stop must be a text, or a list of texts, none of them empty")
    if len(stops) > MAX_STOPS:
        raise unsupported("stop", f"stop must hold at most {MAX_STOPS} texts, got {len(stops)}")
    return stops


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(BaseModel):
    """Fields that completions and chat have in common.

    Attributes:
        model: name of the served model.
        n: choices per prompt.
        seed: makes sampling repeatable; choices of a prompt differ.
        top_k: see `SamplingOptions`; not a field of OpenAI's API.
        repetition_penalty: see `SamplingOptions`; not a field of OpenAI's API.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=1 << 63)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: Annotated[list[str], BeforeValidator(as_stops)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in NEUTRAL.items():
            if name in data and not any(type(data[name]) is type(x) and data[name] == x for x in _with_floats(neutral)):
                raise unsupported(name, f"{name} is not supported: leave it out")
        return {name: value for name, value in data.items() if name not in NEUTRAL and name not in ABOUT_CALLER}

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise unsupported("stream_options", "stream_options needs stream")
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def new_tokens(self) -> int | None:
        """Number of new tokens that the request asks for; None for the default."""
        return self.max_tokens

    @property
    def default_tokens(self) -> int:
        """Number of new tokens of a request that does not say, at most."""
        raise NotImplementedError

    @property
    def num_logprobs(self) -> int | None:
        """Number of most likely tokens in the answer; None for no log-probabilities."""
        raise NotImplementedError

    def sampling(self, max_new_tokens: int, seed: int | None) -> SamplingOptions:
        """Options for the engine; the default temperature is OpenAI's, 1."""
        return SamplingOptions(
            max_new_tokens=max_new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=seed,
        )


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`.

    Example:
        >>> from lightning_attention.serving.protocol import CompletionRequest
        >>> CompletionRequest.model_validate({"model": "demo", "prompt": [1, 2]}).prompt
        [[1, 2]]
    """

    prompt: Annotated[list[str | list[int]], BeforeValidator(as_prompts)]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check_combinations(self) -> "CompletionRequest":
        if self.best_of not in (None, self.num_choices):
            raise unsupported("best_of", "best_of is not supported beyond n: leave it out")
        if self.echo and self.logprobs is not None:
            raise unsupported("echo", "echo with logprobs is not supported: leave out one of them")
        return self

    @property
    def default_tokens(self) -> int:
        return COMPLETION_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    """Part of the content of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """Message of a conversation; the role "developer" is read as "system"."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(default=None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in MESSAGE_NEUTRAL & data.keys():
            if data[name] not in (None, []):
                raise unsupported("messages", f"{name} of a message is not supported: leave it out")
        return {name: value for name, value in data.items() if name not in MESSAGE_NEUTRAL}

    @property
    def text(self) -> str:
        """Content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def for_template(self) -> dict[str, str]:
        """Message as chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.text} | ({} if self.name is None else {"name": self.name})


class ChatRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`.

    Example:
        >>> from lightning_attention.serving.protocol import ChatRequest
        >>> ChatRequest(model="demo", messages=[{"role": "user", "content": "hi"}]).messages[0].text
        'hi'
    """

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_combinations(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise unsupported("top_logprobs", "top_logprobs needs logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise unsupported("max_tokens", "give max_tokens or max_completion_tokens, not both")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def default_tokens(self) -> int:
        return CHAT_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _with_floats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Add the float of every int: 0.0 asks for as little as 0."""
    return values + tuple(float(x) for x in values if type(x) is int)
