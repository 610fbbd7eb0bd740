"""From requests of the API to choices of the engine."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..inference import ChatPrompts, Engine, encode
from ..inference.packing import can_pack
from ..models import LightningForCausalLM
from .choices import Choice
from .errors import ApiError
from .metrics import Metrics
from .options import ServerOptions
from .protocol import ChatRequest, CompletionRequest, GenerationRequest
from .tokens import TokenTexts
from .worker import Answer, Worker

POLL_SECONDS = 0.05  # between looks at the requests that run, while the server drains


class Service:
    """A model, its engine, and the limits of a server.

    Args:
        model: see `Engine`.
        tokenizer: tokenizer of the model.
        options: options of the server.

    Attributes:
        in_flight: number of HTTP requests that are being answered.
        is_draining: the server ends, and refuses new requests.
        is_hurried: the server ends without waiting for the requests that run.
        max_length: tokens of a prompt and its choice, at most; None for no limit.
    """

    def __init__(self, model: LightningForCausalLM, tokenizer: PreTrainedTokenizerFast, options: ServerOptions):
        self.tokenizer, self.options = tokenizer, options
        self.chat = ChatPrompts(tokenizer, options.chat_template)
        self.texts = TokenTexts(tokenizer)
        self.engine = engine = Engine(
            model,
            max_requests=options.max_requests,
            prefix_slots=options.prefix_slots,
            pack_weights=can_pack(model),
        )
        positions = model.config.position_limit
        # The last token of a choice is not read.
        limits = [options.max_length, None if positions is None else positions + 1]
        self.max_length = min((limit for limit in limits if limit is not None), default=None)
        self.metrics = Metrics()
        self.worker = Worker(engine, self.metrics)
        self.created = int(time.time())
        self.in_flight, self.is_draining, self.is_hurried = 0, False, False
        self._encoder = ThreadPoolExecutor(1, "encoder")  # so that long prompts do not hold up the event loop
        for name, documentation, value in (
            ("requests_running", "Choices with a slot.", lambda: engine.num_running),
            ("requests_waiting", "Choices that wait for a slot.", lambda: self.worker.num_active - engine.num_running),
            ("free_slots", "Slots that no choice uses.", lambda: engine.max_requests - engine.num_running),
            ("cached_prefixes", "States in the prefix cache.", lambda: len(engine.prefixes)),
        ):
            self.metrics.add_gauge(name, documentation, value)

    def description(self) -> dict[str, Any]:
        """Description of the model, for `/v1/models`."""
        pool = self.engine.pool
        return {
            "id": self.options.model,
            "object": "model",
            "created": self.created,
            "owned_by": "lightning-attention",
            "parameters": sum(parameter.numel() for parameter in self.engine.model.parameters()),
            "state_bytes": pool.nbytes // pool.num_slots,
            "max_length": self.max_length,
        }

    def check_model(self, name: str) -> None:
        """Raise an ApiError unless the model is the one that is served."""
        if name != self.options.model:
            raise ApiError(
                404,
                f"there is no model {name!r}: this server has {self.options.model!r}",
                param="model",
                code="model_not_found",
            )

    async def complete(self, body: CompletionRequest) -> Answer:
        """Start a completion.

        Raises:
            ApiError: the request is not possible, or too many wait.
        """

        def prompts() -> list[list[int]]:
            return [encode(self.tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in body.prompt]

        return await self._start(body, len(body.prompt), prompts, [])

    async def converse(self, body: ChatRequest) -> Answer:
        """Start the answer to a conversation.

        Raises:
            ApiError: as `complete`, or the chat template refuses the messages.
        """
        messages = [message.for_template() for message in body.messages]
        return await self._start(body, 1, lambda: [self.chat.encode(messages)], self.chat.stops)

    def echoes(self, body: CompletionRequest) -> list[str]:
        """Texts of the prompts, one for each choice."""
        texts = [
            prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, skip_special_tokens=True)
            for prompt in body.prompt
        ]
        return [str(text) for text in texts for _ in range(body.num_choices)]

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, wait for the end of those that run, at most some seconds, and stop the engine."""
        self.is_draining = True
        deadline = time.monotonic() + seconds
        while self.in_flight and not self.is_hurried and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        await asyncio.to_thread(self.worker.stop)

    def close(self) -> None:
        """Stop the threads."""
        self.worker.stop()
        self._encoder.shutdown()

    async def _start(
        self,
        body: GenerationRequest,
        num_prompts: int,
        encode_prompts: Callable[[], list[list[int]]],
        stops: list[str],
    ) -> Answer:
        arrived, count = time.monotonic(), num_prompts * body.num_choices
        self._reserve(count)

        def submit() -> Answer:
            choices: list[Choice] = []
            try:
                choices += self._choices(body, encode_prompts(), stops, arrived)
                return self._submit(choices)
            finally:
                self.worker.release(count - sum(choice.request >= 0 for choice in choices))

        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, submit)
        except ValueError as error:
            raise ApiError(400, str(error), param=_prompt_field(body)) from error

    def _reserve(self, count: int) -> None:
        room = self.options.max_requests + self.options.max_waiting
        if count > room:
            raise ApiError(400, f"a request may ask for at most {room} choices, all prompts together", param="n")
        if not self.worker.reserve(count, room):
            headers = {"Retry-After": "1"}
            raise ApiError(429, "too many requests wait: try again later", code="rate_limit_exceeded", headers=headers)

    def _choices(
        self,
        body: GenerationRequest,
        prompts: list[list[int]],
        stops: list[str],
        arrived: float,
    ) -> list[Choice]:
        choices: list[Choice] = []
        for prompt in prompts:
            new_tokens = self._new_tokens(body, len(prompt))
            options = body.sampling(new_tokens, None)
            for i in range(body.num_choices):
                seeded = replace(options, seed=choice_seed(body.seed, i))
                text_stops = [*body.stop, *stops]
                choices.append(
                    Choice(len(choices), prompt, seeded, text_stops, body.num_logprobs, self.tokenizer, arrived)
                )
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return choices

    def _new_tokens(self, body: GenerationRequest, prompt_length: int) -> int:
        """Number of new tokens of a choice; by default as many as fit, up to a number.

        Raises:
            ApiError: the request asks for more than the server generates, or than fit after the prompt.
        """
        limit, new_tokens = self.options.max_tokens, body.new_tokens
        if new_tokens is not None and new_tokens > limit:
            raise ApiError(400, f"this server generates at most {limit} tokens, got {new_tokens}", param="max_tokens")
        left = limit if self.max_length is None else self.max_length - prompt_length
        if new_tokens is None:
            new_tokens = min(body.default_tokens, limit, max(left, 1))
        if new_tokens > left:
            raise ApiError(
                400,
                f"{prompt_length} tokens of the prompt and {new_tokens} new ones exceed the longest length of "
                f"{self.max_length} tokens",
                param=_prompt_field(body),
                code="context_length_exceeded",
            )
        return new_tokens

    def _submit(self, choices: list[Choice]) -> Answer:
        """Submit all choices, or none."""
        answer = Answer(self.worker, choices)
        try:
            for choice in choices:
                self.worker.submit(choice, answer)
        except BaseException:
            answer.close()
            raise
        return answer


def _prompt_field(body: GenerationRequest) -> str:
    return "messages" if isinstance(body, ChatRequest) else "prompt"


def choice_seed(seed: int | None, index: int) -> int | None:
    """Seed of a choice of a prompt: that of the request for the first one, and derived from it for the others."""
    if seed is None or index == 0:
        return seed
    digest = blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
