"""Check of the Host header, memory of bodies, counts of requests, and answers to faults, for all routes."""

import time
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recurrent_bart.serving.errors import detail_of
from recurrent_bart.serving.service import Service


class ServiceMiddleware:
    """ASGI middleware of the service.

    A page of another site can let its own name point to this machine. Its requests then look like requests of the same
    site, but name the wrong host.
    """

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service
        hosts = service.settings.allowed_hosts
        self.allowed_hosts = None if hosts is None else {name_of(host) for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and count it and its seconds by its route."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status, headers = time.perf_counter(), 0, Headers(scope=scope)
        has_ended = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"

        async def read() -> Message:
            nonlocal has_ended
            message = await receive()
            has_ended = has_ended or not message.get("more_body")
            return message

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not has_ended:
                    # the server would read the rest of the body, which may be endless
                    MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        try:
            with self.service.bodies.of_request() as count:
                scope.setdefault("state", {})["count_body"] = count
                await (self._refusal(headers) or self.app)(scope, read, note)
        except Exception as error:
            response = JSONResponse({"detail": detail_of(error, "request")}, 500)
            if not status:
                await response(scope, read, note)
        route = getattr(scope.get("route"), "path", "unknown")
        self.service.metrics.add("requests_total", route=route, status=status)
        self.service.metrics.add("request_seconds_sum", time.perf_counter() - begin, route=route)
        self.service.metrics.add("request_seconds_count", route=route)

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        """Return the answer to a wrong host name, or to all requests once the model's thread has ended; else None."""
        if self.allowed_hosts is not None and name_of(headers.get("host", "")) not in self.allowed_hosts:
            detail = "requests to this host name are refused; --allowed_hosts adds a name"
            return JSONResponse({"detail": detail}, 403)
        if not self.service.worker.is_alive:
            return JSONResponse({"detail": "the model's thread has ended; start the service again"}, 503)
        return None


def name_of(host: str) -> str | None:
    """Return the name or address in a Host header, without port and brackets; None if it has none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
