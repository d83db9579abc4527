"""Every failure in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`, with OpenAI's status codes."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from obfuscatune.errors import (
    DataError,
    IntegrityError,
    ObfuscaTuneError,
    Overloaded,
    RequestTimeout,
    StorageError,
    TermsError,
)
from obfuscatune.service.limits import Busy

log = logging.getLogger(__name__)
_MOST_CHARACTERS = 1000


class ErrorDetails(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetails


class ApiError(HTTPException):
    """A failure that a client is told of. FastAPI passes HTTP exceptions on, wherever they arise."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.status = status
        self.body = error_body(message, kind, param, code)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    told = None if param is None else _encodable(param[:_MOST_CHARACTERS])
    return {"error": {"message": _encodable(message[:_MOST_CHARACTERS]), "type": kind, "param": told, "code": code}}


def _encodable(text: str) -> str:
    """Text that JSON has: a client may have sent halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()


def not_found(what: str, row_id: str, code: str | None = None, param: str | None = None) -> ApiError:
    """What is not there, or is another owner's: the two are told alike."""
    return ApiError(404, f"No such {what}: {row_id[:100]}", param=param, code=code)


def from_error(error: BaseException) -> ApiError:
    """What a client is told of one of our own errors."""
    match error:
        case ApiError():
            return error
        case Overloaded():
            seconds = str(math.ceil(error.retry_after_s if isinstance(error, Busy) else 1.0))
            return ApiError(
                429,
                f"Rate limit reached: {error}. Try again in {seconds} s.",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"retry-after": seconds},
            )
        case RequestTimeout():
            return ApiError(504, str(error), kind="server_error", code="timeout")
        case TermsError():
            return ApiError(403, str(error), kind="permission_error", code="terms")
        case DataError():
            return ApiError(400, str(error), code="invalid_data")
        case IntegrityError() | StorageError():
            log.warning("%s: %s", type(error).__name__, error)
            return ApiError(500, "What is stored cannot be read or written.", kind="server_error", code="storage")
        case ObfuscaTuneError():
            log.warning("%s: %s", type(error).__name__, error)
            return ApiError(503, "The model cannot answer now.", kind="server_error", code="model_unavailable")
        case _:  # its text may hold what a client sent
            log.warning("unexpected %s", type(error).__name__)
            return ApiError(500, "The server had an error.", kind="server_error", code="internal_error")


def install(app: FastAPI) -> None:
    """Have the app answer every failure so."""

    async def told(_request: Request, error: Exception) -> JSONResponse:
        return answer(from_error(error))

    for kind in (ApiError, ObfuscaTuneError, Exception):
        app.add_exception_handler(kind, told)

    async def invalid(_request: Request, error: Exception) -> JSONResponse:
        return answer(_of_validation(error.errors() if isinstance(error, RequestValidationError) else ()))

    async def http(_request: Request, error: Exception) -> JSONResponse:
        status = error.status_code if isinstance(error, HTTPException) else 500
        detail = str(error.detail) if isinstance(error, HTTPException) else ""
        headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
        return answer(ApiError(status, detail or "Invalid request.", headers=headers))

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def answer(error: ApiError) -> JSONResponse:
    """The answer that tells of it."""
    return JSONResponse(error.body, error.status, dict(error.headers or {}))


def _of_validation(errors: Sequence[Any]) -> ApiError:
    """The first fault. What was sent is not repeated: the answer may be logged by whoever gets it."""
    first = errors[0] if errors else {"loc": (), "msg": "Invalid request.", "type": "invalid"}
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: {param}", param=param, code="missing_required_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, "The body of the request is no valid JSON.", code="invalid_json")
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"Invalid {param or 'request'}: {message}", param=param, code="invalid_value")
