"""Sessions on disk: each is one safetensors file, which is replaced as a whole after each piece of text."""

import fcntl
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from recurrent_bart.inference.reading_session import ReadingSession, Summary
from recurrent_bart.inference.summarizer import Summarizer
from recurrent_bart.serving.settings import Settings

ID = re.compile(r"[A-Za-z0-9_-]{22}")
SUFFIX = ".safetensors"


class NoSession(LookupError):  # noqa: N818 - a status, not a fault
    """Notice that there is no session with this id, or that it was deleted after its time to live."""


class TooManySessions(RuntimeError):  # noqa: N818 - a status, not a fault
    """Notice that the service holds as many sessions as it may."""


class Gap(ValueError):  # noqa: N818 - a status, not a fault
    """Notice that a piece of text begins after the text that the session has."""


@dataclass
class Opened:
    """Session in memory.

    Attributes:
        n_characters: Characters of text that the session has, on disk too.
    """

    reading: ReadingSession
    n_characters: int


class Sessions:
    """Sessions of one model. One thread calls all methods, except `count`."""

    def __init__(self, summarizer: Summarizer, settings: Settings):
        self.summarizer, self.settings = summarizer, settings
        self.folder = settings.folder
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"--sessions {self.folder}: another server uses this folder") from error
        self._opened: OrderedDict[str, Opened] = OrderedDict()
        # another user must not read texts, and no draft of a killed server may stay
        self.folder.chmod(0o700)
        for draft in (*self.folder.glob("*.tmp"), *self.folder.glob("*.upload")):
            draft.unlink(missing_ok=True)
        self.delete_old()

    def close(self) -> None:
        """Let another server use the folder."""
        self._lock.close()

    def count(self) -> int:
        """Return the number of sessions on disk."""
        return sum(1 for _ in self.folder.glob(f"*{SUFFIX}"))

    def create(self, query: str | None = None) -> str:
        """Begin a session, and return its id. `query` stands before each segment.

        Raises:
            ValueError: The question leaves no room for text.
        """
        self.delete_old()
        if self.count() >= self.settings.n_sessions:
            raise TooManySessions
        id = secrets.token_urlsafe(16)
        self._keep(id, Opened(self.summarizer.open(query=query), 0))
        return id

    def add(self, id: str, text: str, position: int | None) -> int:
        """Add a piece of text, and return the number of characters that the session has then.

        `position` is the number of characters before the piece. What the session has already is passed over, so a
        client that had no answer may send a piece again.

        Raises:
            Gap: The piece begins after the session's text.
        """
        opened = self.find(id)
        begin = opened.n_characters if position is None else position
        if begin > opened.n_characters:
            raise Gap(f"position {begin}: the session has {opened.n_characters} characters")
        new = text[opened.n_characters - begin :]
        if new:
            # until the new state is on disk, only the old state counts
            self._opened.pop(id, None)
            opened.reading.add(new)
            opened.n_characters += len(new)
            self._keep(id, opened)
        return opened.n_characters

    def end_section(self, id: str, change: Callable[[ReadingSession], ReadingSession]) -> Summary:
        """End a section of a session, and return its summary; `change` sets how it is written."""
        opened = self.find(id)
        self._opened.pop(id, None)
        summary = change(opened.reading).end_section()
        self._keep(id, opened)
        return summary

    def stream_section(
        self, id: str, change: Callable[[ReadingSession], ReadingSession]
    ) -> Generator[str, None, Summary]:
        """End a section as `end_section` does, and yield its summary word by word."""
        opened = self.find(id)
        self._opened.pop(id, None)
        summary = yield from change(opened.reading).stream_section()
        self._keep(id, opened)
        return summary

    def find(self, id: str) -> Opened:
        """Return a session, from memory or from disk, and begin its time to live anew."""
        path = self._path(id)
        self._check_age(path)
        opened = self._opened.get(id) or self._read(path)
        os.utime(path)
        self._remember(id, opened)
        return opened

    def state(self, id: str) -> bytes:
        """Return the file of a session."""
        self.find(id)
        return self._path(id).read_bytes()

    def replace(self, id: str, content: bytes) -> int:
        """Replace a session by an uploaded file, and return the number of its characters.

        Raises:
            ValueError: The file is no state of this model.
        """
        self.find(id)
        draft = self.folder / f"{id}.upload"
        try:
            draft.write_bytes(content)
            opened = self._read(draft)
        finally:
            draft.unlink(missing_ok=True)
        self._keep(id, opened)
        return opened.n_characters

    def delete(self, id: str) -> None:
        """Delete a session."""
        path = self._path(id)
        self._check_age(path)
        self._opened.pop(id, None)
        path.unlink(missing_ok=True)

    def delete_old(self) -> None:
        """Delete sessions whose time to live is over."""
        oldest = time.time() - self.settings.session_seconds
        for path in self.folder.glob(f"*{SUFFIX}"):
            if path.stat().st_mtime < oldest:
                self._opened.pop(path.stem, None)
                path.unlink(missing_ok=True)

    def _path(self, id: str) -> Path:
        if not ID.fullmatch(id):
            raise NoSession
        return self.folder / f"{id}{SUFFIX}"

    def _check_age(self, path: Path) -> None:
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError as error:
            raise NoSession from error
        if age > self.settings.session_seconds:
            self._opened.pop(path.stem, None)
            path.unlink(missing_ok=True)
            raise NoSession

    def _read(self, path: Path) -> Opened:
        # the file brings its question, which may differ from the summarizer's
        reading = self.summarizer.open(query="")
        try:
            notes, mark = reading.reader.load(path), reading.reader.bookmark
            n_characters = notes.get("n_characters", mark.position + len(mark.text))
        except ValueError as error:
            # clients must not learn paths
            raise ValueError(str(error).replace(str(path), "state")) from error
        if not isinstance(n_characters, int) or n_characters < 0:
            raise ValueError("state: the number of characters must be a whole number")
        return Opened(reading, n_characters)

    def _keep(self, id: str, opened: Opened) -> None:
        """Write a session, then keep it in memory."""
        try:
            opened.reading.reader.save(self._path(id), {"n_characters": opened.n_characters})
        except ValueError as error:
            # a full disk is no mistake of the client
            raise OSError("the session cannot be written") from error
        self._remember(id, opened)

    def _remember(self, id: str, opened: Opened) -> None:
        self._opened[id] = opened
        self._opened.move_to_end(id)
        while len(self._opened) > self.settings.n_readers:
            self._opened.popitem(last=False)
