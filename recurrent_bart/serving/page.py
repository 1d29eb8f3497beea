"""Page of the service: one HTML file, one style sheet and one script, without a network of other sites."""

import functools
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

FOLDER = Path(__file__).parent / "page_files"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
# Only files and answers of this service; no inline script or style, no frame, and no text that becomes a script.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Add the page at /. It needs no token: it holds no secret, and asks for the token itself."""
    for path, (name, kind) in FILES.items():
        app.add_api_route(path, functools.partial(_answer, name, kind), include_in_schema=False)


def _answer(name: str, kind: str) -> FileResponse:
    return FileResponse(FOLDER / name, media_type=kind, headers=HEADERS)
