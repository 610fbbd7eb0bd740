"""Errors in the form of OpenAI's API."""

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ..models.tokenization import well_formed

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
FAILED = "the server failed to answer this request; its log says why"


class ApiError(HTTPException):
    """Error that a client gets as `{"error": {"message", "type", "param", "code"}}`.

    Args:
        status: HTTP status.
        message: what is wrong, and what to do.
        param: field of the request.
        code: name of the error for programs.
        headers: more headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    def body(self) -> dict[str, dict[str, str | None]]:
        """Content of the response."""
        default = "invalid_request_error" if self.status_code < 500 else "server_error"
        kind = KINDS.get(self.status_code, default)
        message, param = (None if text is None else well_formed(text) for text in (self.detail, self.param))
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Response to the client."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of an application in the form of OpenAI's API."""

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        return _from_http(request, error).response()

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        return _from_validation(error).response()

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, FAILED).response()


def _from_http(request: Request, error: HTTPException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    path, message = request.url.path, str(error.detail)
    if error.status_code == 404:
        message = f"there is no route {path}"
    elif error.status_code == 405:
        message = f"{path} does not take the method {request.method}"
    elif error.status_code == 400:
        message = "the body is no JSON that this server can read"
    return ApiError(error.status_code, message, headers=error.headers)


def _from_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    # The location starts with "body"; that of invalid JSON is a position in the text.
    names = [str(part) for part in first["loc"][1:]] if first["type"] != "json_invalid" else []
    param = first.get("ctx", {}).get("param") or (names[0] if names else None)
    if first["type"] == "json_invalid":
        message = f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}"
    elif first["type"] == "extra_forbidden":
        message = f"{'.'.join(names)} is not a field that this server knows"
    elif not names and first["type"] != "unsupported":
        message = "the body must be a JSON object, with Content-Type: application/json"
    else:
        text = first["msg"].removeprefix("Value error, ")
        message = text if first["type"] == "unsupported" else f"{'.'.join(names)}: {text}"
    return ApiError(400, message, param=param)
