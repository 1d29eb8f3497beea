"""Statuses of the service's errors, and the log of its faults. No text of a user is logged."""

import sys

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from recurrent_bart.serving.model_worker import Busy
from recurrent_bart.serving.sessions import OUT_OF_MEMORY, Gap, NoMemory, NoSession, TooLarge, TooManySessions

NO_MEMORY = "the text needs more memory than the service has"
# status and text of each expected error, the first that fits; None: the error's own text
STATUSES: dict[type[Exception], tuple[int, str | None]] = {
    NoSession: (404, "no such session; it may have ended after its time to live"),
    TooManySessions: (429, "too many sessions; delete one, or come again later"),
    Busy: (503, "too many requests are waiting; come again later"),
    Gap: (409, None),
    TooLarge: (413, None),
    NoMemory: (503, "other texts hold the memory that this text needs; come again later"),
    **dict.fromkeys(OUT_OF_MEMORY, (413, NO_MEMORY)),
    ValueError: (400, None),
}
# status in the metrics of a request whose client is gone
CLIENT_GONE = 499


def add_errors(app: FastAPI) -> None:
    """Give each expected error its status."""
    for kind, (status, text) in STATUSES.items():

        def answer(_: Request, error: Exception, status: int = status, text: str | None = text) -> Response:
            headers = {"Retry-After": "5"} if status in (429, 503) else None
            return JSONResponse({"detail": text or str(error)}, status, headers)

        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=CLIENT_GONE))


def detail_of(error: Exception, place: str) -> str:
    """Return what a client learns of an error. A fault's type is logged; its message may hold text of a client."""
    for kind, (_, text) in STATUSES.items():
        if isinstance(error, kind):
            return text or str(error)
    print(f"fault in a {place}: {type(error).__name__}", file=sys.stderr, flush=True)
    return "a fault of the service"
