"""Serve summaries and sessions over HTTP: `recurrent-bart serve --model RUN/model`."""

import argparse
import contextlib
import ipaddress
import socket
from pathlib import Path

from transformers.utils import logging

from recurrent_bart.commands.exit_codes import code_of
from recurrent_bart.inference.summarizer import TOKENS_PER_BATCH, Summarizer
from recurrent_bart.serving.settings import Settings
from recurrent_bart.training.flags import FlagParser

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
LIMITS = {
    "n_sessions": "maximum number of sessions on disk",
    "n_cached_sessions": "maximum number of sessions whose state also stays in memory",
    "text_bytes": "maximum number of bytes of a request with a text",
    "text_characters": "maximum number of characters of a text, or of a piece of a session's text",
    "session_characters": "maximum number of characters of a session's whole text",
    "state_bytes": "maximum number of bytes of a session's state, on disk and uploaded",
    "bodies_bytes": "maximum number of bytes of the bodies of all requests in progress",
    "connection_seconds": "maximum time in seconds that a client may take to send the head of a request, or to read a "
    "part of its answer",
    "body_seconds": "maximum time in seconds that a client may take to send a body",
    "session_seconds": "seconds without a request after which a session is deleted",
    "n_waiting": "maximum number of requests that wait for the model or are being answered",
    "step_segments": "maximum number of segments of a long text that are read before other requests have their turn",
}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the flags of this command."""
    parser = FlagParser(description="Serve a page and an API of summaries and sessions; /docs describes the requests.")
    parser.add_argument("--model", required=True, help="folder of the model: RUN/model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0: any; default: %(default)s")
    parser.add_argument("--token_file", type=Path, help="file with the token that requests must carry; default: none")
    parser.add_argument(
        "--allowed_hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="more names by which clients may reach the service, as in http://NAME; default: on an address that only "
        "this machine reaches, localhost and the address",
    )
    parser.add_argument(
        "--sessions", type=Path, default=Path("sessions"), help="folder of the sessions' states; default: %(default)s"
    )
    parser.add_argument(
        "--tokens_per_batch",
        type=int,
        default=TOKENS_PER_BATCH,
        help="maximum number of tokens in a batch of texts, padding included; default: %(default)s",
    )
    for name, text in LIMITS.items():
        default = getattr(Settings, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text}; default: %(default)s")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code from the tokenizer's folder")
    return parser.parse_flags(argv)


def read_token(arguments: argparse.Namespace) -> str | None:
    """Return the token.

    Raises:
        ValueError: The file is unreadable or empty, or an address that other machines can reach has no token.
    """
    if arguments.token_file is None:
        if not is_loopback(arguments.host):
            raise ValueError(f"--host {arguments.host}: other machines can reach this address; give --token_file too")
        return None
    try:
        token = arguments.token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token_file {arguments.token_file}: cannot be read ({error})") from error
    if not token:
        raise ValueError(f"--token_file {arguments.token_file}: the file is empty")
    return token


def allowed_hosts(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """Return the names by which clients may reach the service; None: all names.

    A page of another site may let its name point to this machine. A token, which other addresses need, keeps it out.
    """
    if not is_loopback(arguments.host) and not arguments.allowed_hosts:
        return None
    return (*LOOPBACK, arguments.host, *arguments.allowed_hosts)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket with this address.

    Raises:
        ValueError: The port does not exist, another program uses it, or this machine does not have the address.
    """
    if not 0 <= port <= 65_535:
        raise ValueError(f"--port {port}: must be from 0 to 65535")
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        if bound is not None:
            bound.close()
        raise ValueError(f"--host {host} --port {port}: cannot listen there ({error})") from error
    return bound


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(arguments: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM; requests in progress are then finished.

    Raises:
        ValueError: A package of the extra `serve` is missing, or a flag or the model is unusable.
    """
    limits = {name: getattr(arguments, name) for name in LIMITS}
    for name, value in limits.items():
        if not value > 0:
            raise ValueError(f"--{name} {value}: must be above 0")
    for name in ("text_bytes", "state_bytes"):
        if limits["bodies_bytes"] < limits[name]:
            raise ValueError(f"--bodies_bytes {limits['bodies_bytes']}: must be at least --{name} {limits[name]}")
    settings = Settings(arguments.sessions, read_token(arguments), allowed_hosts(arguments), **limits)
    try:
        import uvicorn

        from recurrent_bart.serving.app import build_app
        from recurrent_bart.serving.connections import Connections, Server
    except ImportError as error:
        raise ValueError(f"{error}: install the package with its extra, recurrent-bart[serve]") from error
    with bind(arguments.host, arguments.port) as bound:
        summarizer = Summarizer.from_pretrained(
            arguments.model, tokens_per_batch=arguments.tokens_per_batch, trust_remote_code=arguments.trust_remote_code
        )
        app = build_app(summarizer, settings)
        # clients that come now wait until the service has started
        bound.listen()
        name = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        print(f"serving    {arguments.model} at http://{name}:{bound.getsockname()[1]}", flush=True)
        connections = Connections(settings.connection_seconds)
        # an access log would hold ids of sessions, and a client could fill a log of warnings
        config = uvicorn.Config(
            app,
            http=connections.protocol,  # type: ignore[arg-type]
            ws="none",
            backlog=connections.backlog,
            access_log=False,
            log_level="error",
            timeout_graceful_shutdown=30,
            timeout_keep_alive=5,
        )
        with contextlib.suppress(KeyboardInterrupt):
            Server(config).run(sockets=[bound])


def main(argv: list[str]) -> int:
    """Run the command. Return the exit code."""
    arguments = parse_arguments(argv)
    logging.disable_progress_bar()
    return code_of(lambda: serve(arguments))
