"""Settings of the service: limits of size, number and time."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Limits of the service, and the folder of its sessions.

    Attributes:
        token: Token that each request must carry; None: no token.
        n_sessions: Most sessions on disk.
        n_readers: Most sessions whose state also stays in memory.
        text_bytes: Most bytes of a text, or of a piece of a session's text.
        state_bytes: Most bytes of an uploaded state.
        body_seconds: Most seconds that a client may take to send a body.
        session_seconds: Seconds without a request after which a session is deleted.
        n_waiting: Most requests that wait for the model.
        n_together: Most texts that are read together.
    """

    folder: Path
    token: str | None = None
    n_sessions: int = 1000
    n_readers: int = 64
    text_bytes: int = 2**22
    state_bytes: int = 2**26
    body_seconds: float = 30.0
    session_seconds: float = 86_400.0
    n_waiting: int = 256
    n_together: int = 64
