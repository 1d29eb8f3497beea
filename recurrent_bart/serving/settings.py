"""Settings of the service: limits of size, number and time."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Limits of the service, and the folder of its sessions.

    Attributes:
        token: Token that each request must carry; None: no token.
        allowed_hosts: Names by which clients may reach the service, without ports; None: all names.
        n_sessions: Most sessions on disk.
        n_cached_sessions: Most sessions whose state also stays in memory.
        text_bytes: Most bytes of a request with a text.
        text_characters: Most characters of a text, or of a piece of a session's text.
        session_characters: Most characters of a session's whole text.
        state_bytes: Most bytes of a session's state, on disk and uploaded.
        bodies_bytes: Most bytes of the bodies of all requests in progress.
        connection_seconds: Most seconds to send the head of a request, or to read a part of its answer.
        body_seconds: Most seconds that a client may take to send a body.
        session_seconds: Seconds without a request after which a session is deleted.
        n_waiting: Most requests that wait for the model or are being answered.
        n_together: Most texts that are read together.
        step_segments: Most segments of a long text that are read before other requests have their turn.
    """

    folder: Path
    token: str | None = None
    allowed_hosts: tuple[str, ...] | None = None
    n_sessions: int = 1000
    n_cached_sessions: int = 64
    text_bytes: int = 2**23
    text_characters: int = 1_000_000
    session_characters: int = 10_000_000
    state_bytes: int = 2**28
    bodies_bytes: int = 2**29
    connection_seconds: float = 20.0
    body_seconds: float = 30.0
    session_seconds: float = 86_400.0
    n_waiting: int = 256
    n_together: int = 64
    step_segments: int = 8
