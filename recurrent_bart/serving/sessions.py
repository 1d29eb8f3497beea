"""Sessions on disk: each is one safetensors file, which is replaced as a whole after each piece of text."""

import contextlib
import fcntl
import os
import re
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from inspect import isgenerator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import ValidationError

from recurrent_bart.data.text_files import with_line_feeds
from recurrent_bart.files import replace_and_fsync
from recurrent_bart.inference.reading_session import ReadingSession, Steps, Summary
from recurrent_bart.inference.summarizer import Summarizer
from recurrent_bart.serving.schemas import Notes, Section
from recurrent_bart.serving.settings import Settings

ID = re.compile(r"[A-Za-z0-9_-]{22}")
SUFFIX = ".safetensors"
# endings of files that a killed server may leave
DRAFTS = ("*.draft", "*.upload")
# summaries of sections that a client can read again
N_SECTIONS_KEPT = 16
# lack of memory on the device or on the host
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
# returns a session that writes other summaries of the same text
Change = Callable[[ReadingSession], ReadingSession]


class NoSession(LookupError):  # noqa: N818 - a status, not a fault
    """Notice that there is no session with this id, or that it was deleted after its time to live."""


class TooManySessions(RuntimeError):  # noqa: N818 - a status, not a fault
    """Notice that the service holds as many sessions as it may."""


class Gap(ValueError):  # noqa: N818 - a status, not a fault
    """Notice that a piece of text, or a section, does not follow the session's text."""


class TooLarge(ValueError):  # noqa: N818 - a status, not a fault
    """Notice that a text, or a session, would be larger than it may be."""


class NoMemory(RuntimeError):  # noqa: N818 - a status, not a fault
    """Notice that other readings hold the memory that a text needs."""


@dataclass
class Opened:
    """Session in memory. Its notes are on disk too."""

    reading: ReadingSession
    notes: Notes


class Sessions:
    """Sessions of one model. One thread calls all methods, except `count` and `using`."""

    def __init__(self, summarizer: Summarizer, settings: Settings):
        self.summarizer, self.settings = summarizer, settings
        self.folder = settings.folder
        self._opened: OrderedDict[str, Opened] = OrderedDict()
        self._in_use: Counter[str] = Counter()
        self._n_readings = 0
        self._use_lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = (self.folder / ".lock").open("w")
            # another user must not read texts
            self.folder.chmod(0o700)
        except OSError as error:
            raise ValueError(f"--sessions {self.folder}: not a writable folder ({error.strerror})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"--sessions {self.folder}: another server uses this folder") from error
        for pattern in DRAFTS:
            for draft in self.folder.glob(pattern):
                draft.unlink(missing_ok=True)
        self.delete_old()

    def close(self) -> None:
        """Let another server use the folder."""
        self._lock.close()

    def count(self) -> int:
        """Return the number of sessions on disk."""
        return sum(1 for _ in self.folder.glob(f"*{SUFFIX}"))

    @contextlib.contextmanager
    def using(self, id: str) -> Iterator[None]:
        """Begin a session's time to live anew, and keep the session until the block ends.

        Raises:
            NoSession: There is no session with this id, or its time to live is over.
        """
        path = self._path(id)
        with self._use_lock:
            self._in_use[id] += 1
        try:
            if self._is_old(path):
                raise NoSession
            os.utime(path)
            yield
        except FileNotFoundError as error:
            raise NoSession from error
        finally:
            with self._use_lock:
                self._in_use[id] -= 1
                self._in_use += Counter()

    def with_memory(self, work: Callable[[], Any]) -> Generator[Any, None, Any]:
        """Do work; if memory is short, drop the idle sessions from memory, and do the work once more.

        `work` returns its result, or a generator that returns it. Work that has yielded a piece of text is not done
        again. Sessions that are dropped stay on disk.

        Raises:
            NoMemory: Memory is still short, and other readings hold memory.
        """
        self._n_readings += 1
        try:
            for is_last in (False, True):
                pieces: list[str] = []
                try:
                    return (yield from _noted(work(), pieces))
                except OUT_OF_MEMORY as error:
                    if is_last and self._n_readings > 1:
                        raise NoMemory from error
                    if is_last or pieces:
                        raise
                # the error, which holds tensors of the work, is gone here
                self._opened.clear()
        finally:
            self._n_readings -= 1

    def create(self, query: str | None = None) -> str:
        """Begin a session, and return its id. `query` stands before each segment; None: the summarizer's question.

        Raises:
            ValueError: The question leaves no room for text.
        """
        self.delete_old()
        if self.count() >= self.settings.n_sessions:
            raise TooManySessions
        id = secrets.token_urlsafe(16)
        self._keep(id, Opened(self._open(query), Notes()))
        return id

    def add(self, id: str, text: str, position: int | None) -> Steps[Opened]:
        """Add a piece of text, and return the session.

        `position` is the number of characters before the piece. What the session has already is passed over, so a
        client that had no answer may send a piece again.

        Raises:
            Gap: The piece begins after the session's text.
            TooLarge: The session would have too many characters, or its state too many bytes.
        """
        opened = self.find(id)
        notes, n_characters = opened.notes, opened.notes.n_characters
        begin = n_characters if position is None else position
        if begin > n_characters:
            raise Gap(f"position {begin}: the session has {n_characters} characters")
        new, most = text[n_characters - begin :], self.settings.session_characters
        if n_characters + len(new) > most:
            raise TooLarge(f"the session would have {n_characters + len(new)} characters; at most {most} are allowed")
        if new:
            self._take(id)
            plain = with_line_feeds(new, is_start=n_characters == 0, follows_return=notes.ends_with_return)
            yield from opened.reading.add_in_steps(plain)
            notes.n_characters += len(new)
            notes.ends_with_return = new.endswith("\r")
            self._keep(id, opened)
        return opened

    def end_section(self, id: str, number: int | None, change: Change) -> Steps[Section]:
        """End a section of a session, and return its summary, which the session writes that `change` returns.

        `number` is the section's number, from 1. The summary of a section that has ended is returned again, so a client
        that had no answer may ask again. The last pause is before the section is kept.

        Raises:
            Gap: The number is not the next one, or the summary is no longer kept.
        """
        ended = self._ended_section(id, number)
        if ended is not None:
            return ended
        opened = self._take(id)
        summary = yield from change(opened.reading).end_section_in_steps()
        yield
        return self._keep_section(id, opened, summary)

    def stream_section(self, id: str, number: int | None, change: Change) -> Steps[Generator[str, None, Section]]:
        """End a section as `end_section` does, and return its summary word by word; the last piece is empty."""
        ended = self._ended_section(id, number)
        if ended is not None:
            return _pieces_of(ended)
        opened = self._take(id)
        reading = change(opened.reading)
        read = yield from reading.read_section()

        def write() -> Generator[str, None, Section]:
            summary = yield from self.with_memory(lambda: reading.stream_after(*read))
            yield ""
            return self._keep_section(id, opened, summary)

        return write()

    def _ended_section(self, id: str, number: int | None) -> Section | None:
        """Return the section with this number if it has ended; None: the number is the next one."""
        notes = self.find(id).notes
        if number is None or number == notes.n_sections + 1:
            return None
        for section in notes.sections:
            if section.number == number:
                return section
        raise Gap(f"number {number}: the session has {notes.n_sections} sections, and keeps the last {N_SECTIONS_KEPT}")

    def _take(self, id: str) -> Opened:
        """Return a session to change; until its new state is on disk, only the old state counts."""
        opened = self.find(id)
        self._opened.pop(id, None)
        return opened

    def _keep_section(self, id: str, opened: Opened, summary: Summary) -> Section:
        notes = opened.notes
        notes.n_sections += 1
        section = Section.of(summary, number=notes.n_sections)
        notes.sections = [*notes.sections, section][-N_SECTIONS_KEPT:]
        self._keep(id, opened)
        return section

    def find(self, id: str) -> Opened:
        """Return a session, from memory or from disk."""
        path = self._path(id)
        if not path.exists():
            raise NoSession
        opened = self._opened.get(id) or self._read(path)
        self._remember(id, opened)
        return opened

    def state(self, id: str) -> tuple[BinaryIO, int]:
        """Return the open file of a session, and its size in bytes."""
        file = self._path(id).open("rb")
        return file, os.fstat(file.fileno()).st_size

    def replace(self, id: str, content: bytes) -> Opened:
        """Replace a session by an uploaded file, and return the new session.

        Raises:
            ValueError: The file is no state of this model.
        """
        draft = self._path(id).with_suffix(".upload")
        try:
            draft.write_bytes(content)
            opened = self._read(draft)
        finally:
            draft.unlink(missing_ok=True)
        self._keep(id, opened)
        return opened

    def delete(self, id: str) -> None:
        """Delete a session."""
        self._opened.pop(id, None)
        self._path(id).unlink(missing_ok=True)

    def delete_old(self) -> None:
        """Delete sessions whose time to live is over, except sessions in use."""
        for path in self.folder.glob(f"*{SUFFIX}"):
            with self._use_lock:
                if self._is_old(path) and not self._in_use[path.stem]:
                    self.delete(path.stem)

    def _is_old(self, path: Path) -> bool:
        return time.time() - path.stat().st_mtime > self.settings.session_seconds

    def _path(self, id: str) -> Path:
        if not ID.fullmatch(id):
            raise NoSession
        return self.folder / f"{id}{SUFFIX}"

    def _open(self, query: str | None) -> ReadingSession:
        return self.summarizer.open(self.settings.step_segments, query)

    def _read(self, path: Path) -> Opened:
        # the file brings its question, which may differ from the summarizer's
        reading = self._open("")
        try:
            saved = reading.reader.load(path)
        except ValueError as error:
            # clients must not learn paths
            raise ValueError(str(error).replace(str(path), "state")) from error
        try:
            # the command line writes no notes
            return Opened(reading, Notes.model_validate({"n_characters": reading.n_characters, **saved}))
        except ValidationError:
            # the error's own text may hold text of a client
            raise ValueError("state: its notes are not those of a session") from None

    def _keep(self, id: str, opened: Opened) -> None:
        """Write a session, then keep it in memory.

        Raises:
            TooLarge: The file has too many bytes. The old file stays.
            OSError: The file cannot be written. A full disk is no mistake of the client.
        """
        path = self._path(id)
        draft, most = path.with_suffix(".draft"), self.settings.state_bytes
        try:
            opened.reading.reader.write(draft, opened.notes.model_dump())
            n_bytes = draft.stat().st_size
            if n_bytes > most:
                raise TooLarge(f"the session's state would have {n_bytes} bytes; at most {most} are allowed")
            replace_and_fsync(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        self._remember(id, opened)

    def _remember(self, id: str, opened: Opened) -> None:
        self._opened[id] = opened
        self._opened.move_to_end(id)
        while len(self._opened) > self.settings.n_cached_sessions:
            self._opened.popitem(last=False)


def _noted(result: Any, pieces: list[str]) -> Generator[Any, None, Any]:
    """Yield what a generator yields, add its pieces of text to a list, and return its result."""
    if not isgenerator(result):
        return result
    steps: Any = result
    with contextlib.closing(steps):
        while True:
            try:
                piece = next(steps)
            except StopIteration as end:
                return end.value
            if piece:
                pieces.append(piece)
            yield piece


def _pieces_of(section: Section) -> Generator[str, None, Section]:
    yield section.summary
    return section
