"""The application: routes, what becomes of errors, health and metrics."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from budgetsearch.core.errors import UsageError
from budgetsearch.tools.serve import challenge, openai_routes
from budgetsearch.tools.serve.asking import Failed, Gone, Served, TooLong
from budgetsearch.tools.serve.metrics import Metrics
from budgetsearch.training.inference.engine import Busy, Closing

OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")
HUNG_UP = 499
"""As nginx writes it down; nobody reads it."""
AGAIN_SECONDS = 1
"""After which a client that was sent away may ask again."""
Next = Callable[[Request], Awaitable[Response]]


def make_app(served: Served, *, loopback: bool = True) -> FastAPI:
    """The application for one model; ``loopback``: requests must name this machine by a name of its own, so
    that no page of another site can ask."""
    app = FastAPI(title=f"budgetsearch: {served.name}", docs_url=None, redoc_url=None)
    metrics = Metrics(served.engine)

    @app.middleware("http")
    async def measured(request: Request, following: Next) -> Response:
        start = time.perf_counter()
        response = await following(request)
        metrics.note(request.url.path, response.status_code, time.perf_counter() - start)
        return response

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = served.engine.is_alive
        about = {"status": "ok" if alive else "closing", "model": served.name}
        return JSONResponse(
            {**about, "waiting": served.engine.waiting, "active": served.engine.active},
            status_code=200 if alive else 503,
        )

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=metrics.media_type)

    _add_errors(app)
    app.include_router(challenge.routes(served))
    app.include_router(openai_routes.routes(served))
    if loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*OWN_NAMES, "testserver"])
    return app


STATUS: dict[type[Exception], tuple[int, str]] = {
    TooLong: (400, "context_length_exceeded"),
    UsageError: (400, "invalid_request_error"),
    Busy: (429, "rate_limit_exceeded"),
    Closing: (503, "server_shutting_down"),
    Failed: (500, "server_error"),
    Gone: (HUNG_UP, "client_closed_request"),
}


def _add_errors(app: FastAPI) -> None:
    def answer(request: Request, status: int, code: str, message: str) -> JSONResponse:
        headers = {"Retry-After": str(AGAIN_SECONDS)} if status in (429, 503) else None
        content: dict[str, Any] = {"detail": message}
        if request.url.path.startswith("/v1"):
            kind = "server_error" if status >= 500 else "invalid_request_error"
            content = {"error": {"message": message, "type": kind, "param": None, "code": code}}
        return JSONResponse(content, status_code=status, headers=headers)

    def handler(status: int, code: str) -> Any:
        async def handle(request: Request, error: Exception) -> JSONResponse:
            return answer(request, status, code, str(error))

        return handle

    for kind, (status, code) in STATUS.items():
        app.add_exception_handler(kind, handler(status, code))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return answer(request, error.status_code, "model_not_found", str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def misread(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return answer(request, 400, "invalid_request_error", f"{place}: {first['msg']}")
