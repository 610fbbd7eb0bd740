"""The routes of the server."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerFast

from ..models import LightningForCausalLM
from .choices import Piece
from .errors import FAILED, ApiError, add_error_handlers
from .middleware import BodyLimit, Counting, HostCheck, KeyCheck
from .options import ServerOptions
from .page import page_response
from .protocol import ChatRequest, CompletionRequest, GenerationRequest
from .responses import DONE, ChatFormat, CompletionFormat, ResponseWriter, event, usage
from .service import Service
from .worker import Answer

Result = TypeVar("Result")


def create_app(model: LightningForCausalLM, tokenizer: PreTrainedTokenizerFast, options: ServerOptions) -> FastAPI:
    """Create the ASGI application of the server; its engine runs from startup to shutdown.

    Args:
        model: as `lightning_attention.inference.load` returns it.
        tokenizer: as `lightning_attention.inference.load` returns it.
        options: name and limits.

    Returns:
        The application; `app.state.service` is its `Service`.

    Raises:
        ValueError: the engine cannot run the model, or the chat template is not valid.

    Example:
        >>> from lightning_attention.inference import load
        >>> from lightning_attention.serving import ServerOptions, create_app
        >>> app = create_app(*load("run"), ServerOptions("demo"))
    """
    service = Service(model, tokenizer, options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    app = FastAPI(title="lightning-attention", openapi_url=None, lifespan=lifespan, redirect_slashes=False)
    app.state.service = service
    add_error_handlers(app)
    _add_routes(app, service)
    # The last one added comes first.
    app.add_middleware(BodyLimit, limit=options.max_body_bytes)
    app.add_middleware(KeyCheck, key=options.api_key)
    app.add_middleware(HostCheck, hosts=options.hosts)
    app.add_middleware(Counting, service=service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.get("/", response_model=None)
    async def page() -> Response:
        return page_response()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.description()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.description()

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        answer = await service.complete(body)
        echoes = service.echoes(body) if body.echo else []
        return await _respond(
            request, body, answer, ResponseWriter(CompletionFormat(service.texts, echoes), body.model)
        )

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        answer = await service.converse(body)
        return await _respond(request, body, answer, ResponseWriter(ChatFormat(service.texts), body.model))


async def _respond(request: Request, body: GenerationRequest, answer: Answer, writer: ResponseWriter) -> Response:
    """Respond when the answer is complete, or with a stream once it has begun."""
    try:
        pieces = answer.pieces()
        if not body.stream:
            whole = await _unless_left(request, _collect(pieces))
            content = writer.whole(whole, _usage(body, answer, whole))
            answer.close()
            return JSONResponse(content)
        first = await _unless_left(request, anext(pieces))
        _check(first)
        return EventStream(_events(body, answer, writer, first, pieces), answer)
    except BaseException:
        answer.close()
        raise


class EventStream(StreamingResponse):
    """Stream of events, which closes the answer however the response ends."""

    def __init__(self, events: AsyncIterator[bytes], answer: Answer):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def _events(
    body: GenerationRequest,
    answer: Answer,
    writer: ResponseWriter,
    first: list[Piece],
    others: AsyncIterator[list[Piece]],
) -> AsyncIterator[bytes]:
    no_usage: dict[str, Any] = {"usage": None} if body.includes_usage else {}
    starts = [writer.form.first_chunk(choice.index) for choice in answer.choices]
    for start in starts:
        if start is not None:
            yield writer.event([start], no_usage)
    num_tokens, pieces = 0, first
    try:
        while True:
            _check(pieces)
            for piece in pieces:
                num_tokens += piece.num_tokens
                if piece.text or piece.entries or piece.is_last:
                    yield writer.event([writer.form.chunk(piece)], no_usage)
            pieces = await anext(others)
    except StopAsyncIteration:
        pass
    except ApiError as error:
        yield event(error.body())
        return
    if body.includes_usage:
        yield writer.event([], {"usage": usage(_prompt_tokens(body, answer), num_tokens)})
    yield DONE


async def _collect(pieces: AsyncIterator[list[Piece]]) -> list[Piece]:
    """Merge the pieces of each choice."""
    merged: dict[int, list[Piece]] = {}
    async for some in pieces:
        _check(some)
        for piece in some:
            merged.setdefault(piece.index, []).append(piece)
    return [Piece.joined(merged[index]) for index in sorted(merged)]


async def _unless_left(request: Request, result: Awaitable[Result]) -> Result:
    """Wait for a result while the client waits.

    Raises:
        ApiError: the client has left.
    """
    work, leaving = asyncio.ensure_future(result), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(499, "the client has left")
        return work.result()
    finally:
        for task in (work, leaving):
            task.cancel()
        await asyncio.gather(work, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check(pieces: list[Piece]) -> None:
    for piece in pieces:
        if piece.failure == "cancelled":
            raise ApiError(503, "the server is about to stop")
        if piece.failure is not None:
            raise ApiError(500, FAILED)


def _usage(body: GenerationRequest, answer: Answer, pieces: list[Piece]) -> dict[str, Any]:
    return usage(_prompt_tokens(body, answer), sum(piece.num_tokens for piece in pieces))


def _prompt_tokens(body: GenerationRequest, answer: Answer) -> int:
    return sum(len(choice.prompt) for choice in answer.choices[:: body.num_choices])
