"""Check of the Host header, counts of requests, and answers to faults, for all routes."""

import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recurrent_bart.serving.errors import detail_of
from recurrent_bart.serving.metrics import Metrics


class ServiceMiddleware:
    """ASGI middleware of the service.

    A page of another site can let its own name point to this machine. Its requests then look like requests of the same
    site, but name the wrong host.

    Args:
        allowed_hosts: Names by which clients may reach the service; None: all names.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, allowed_hosts: Sequence[str] | None):
        self.app, self.metrics = app, metrics
        self.allowed_hosts = None if allowed_hosts is None else {name_of(host) for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and count it and its seconds by its route."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self.allowed_hosts is None or name_of(Headers(scope=scope).get("host", "")) in self.allowed_hosts:
                await self.app(scope, receive, note)
            else:
                detail = "requests to this host name are refused; --allowed_hosts adds a name"
                await JSONResponse({"detail": detail}, 403)(scope, receive, note)
        except Exception as error:
            response = JSONResponse({"detail": detail_of(error, "request")}, 500)
            if not status:
                await response(scope, receive, note)
        route = getattr(scope.get("route"), "path", "unknown")
        self.metrics.add("requests_total", route=route, status=status)
        self.metrics.add("request_seconds_sum", time.perf_counter() - begin, route=route)
        self.metrics.add("request_seconds_count", route=route)


def name_of(host: str) -> str | None:
    """Return the name or address in a Host header, without port and brackets; None if it has none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
