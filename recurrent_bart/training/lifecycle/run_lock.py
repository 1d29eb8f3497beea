"""Lock of a run folder: only one run at a time trains in it.

RUN/lock names the process that trains. A thread of the process renews the file's modification time. A new run takes
over the lock of a dead process: at once if the death can be verified, else after a minute without renewal.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

LOCK_FILE = "lock"
RENEWAL_SECONDS = 10.0
# a process on another host counts as dead if it has not renewed its lock for this time
STALE_SECONDS = 60.0
# psutil computes the start of a process from the system clock, which may be adjusted
CLOCK_TOLERANCE_SECONDS = 5.0


class RunLockLostError(RuntimeError):
    """Error that another run has taken over the folder of this run."""


@dataclass(frozen=True)
class Holder:
    """Process that holds a lock.

    Attributes:
        host: Host name.
        machine: Boot id and process namespace. Process ids can be compared only if both are equal.
        pid: Process id.
        started: Start of the process in seconds since the epoch, because process ids are reused.
        job: Batch job id; empty: none.
        n_restarts: Number of times the job was requeued.
        token: Random text, different for each lock.
    """

    host: str
    machine: str
    pid: int
    started: float
    job: str
    n_restarts: int
    token: str

    @classmethod
    def here(cls, job: str, n_restarts: int) -> Self:
        """Describe the calling process."""
        process = psutil.Process()
        return cls(
            socket.gethostname(),
            _machine(),
            process.pid,
            process.create_time(),
            job,
            n_restarts,
            secrets.token_hex(8),
        )

    def is_gone(self, here: "Holder") -> bool | None:
        """Return True if the process has ended, False if it runs, None if this host cannot know."""
        if self.machine == here.machine:
            return not _is_running(self.pid, self.started)
        if self.job and self.job == here.job and self.n_restarts < here.n_restarts:
            return True
        return None

    def __str__(self) -> str:
        job = f", batch job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


@dataclass(frozen=True)
class Seen:
    """Content and modification time of a lock file. `holder` is None if the content is incomplete."""

    holder: Holder | None
    renewed: float

    @property
    def token(self) -> str | None:
        """Token of the holder."""
        return self.holder.token if self.holder else None


class RunLock:
    """Lock of one run folder. Before `acquire`, its methods do nothing.

    Args:
        folder: Run folder.
        holder: Calling process.
        made: Folders that were created for the run, the innermost first.
        say: Called with a line of text before a long wait.
    """

    def __init__(
        self, folder: Path, holder: Holder, made: Sequence[Path] = (), say: Callable[[str], None] = lambda text: None
    ):
        self.folder, self.file, self.holder, self.made, self.say = folder, folder / LOCK_FILE, holder, made, say
        self.is_held = self.is_lost = False
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock, also from a dead process, and start to renew it.

        Raises:
            ValueError: Another run trains in the folder, or the file cannot be written.
        """
        try:
            while not self._create(seen := self._read()):
                if seen:
                    self._wait_until_gone(seen)
                    if self._take_over(seen):
                        break
        except OSError as error:
            raise ValueError(f"{self.file}: cannot be written ({error.strerror})") from error
        self.is_held = True
        threading.Thread(target=self._keep_renewing, name="run lock", daemon=True).start()

    def renew(self) -> None:
        """Renew the lock file's modification time, and detect if another run has taken over the lock."""
        if not self.is_held or self.is_lost:
            return
        # an error of the file system does not mean that another run has the lock
        with contextlib.suppress(OSError):
            seen = self._read()
            if seen is None:
                self._create(None)
            elif seen.token == self.holder.token:
                os.utime(self.file)
            else:
                self.is_lost = True

    def check(self) -> None:
        """Raise RunLockLostError if another run has taken over a lock that this run did not renew in time."""
        if self.is_lost:
            raise RunLockLostError(
                f"{self.folder}: another run has taken over this folder, because this run did not respond for "
                f"{STALE_SECONDS:.0f} s; this run ends and writes nothing more"
            )

    def release(self) -> None:
        """Release the lock."""
        self._released.set()
        self.renew()
        if self.is_held and not self.is_lost:
            with contextlib.suppress(OSError):
                self.file.unlink()
        self.is_held = False

    def abandon(self) -> None:
        """Release the lock of a run that has not begun, and remove the empty folders that were created for it."""
        self.release()
        for folder in self.made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _read(self) -> Seen | None:
        """Read the lock file. Return None without a file. Opening a file updates a network file system's cache."""
        try:
            with self.file.open(encoding="utf-8") as file:
                renewed, text = os.fstat(file.fileno()).st_mtime, file.read()
        except FileNotFoundError:
            return None
        try:
            return Seen(Holder(**json.loads(text)), renewed)
        except (ValueError, TypeError):
            return Seen(None, renewed)

    def _create(self, seen: Seen | None) -> bool:
        """Create the lock file unless it exists. Return True if this process created the file."""
        if seen is not None:
            return False
        with self._draft() as draft:
            try:
                # a hard link gives the file its name and its content at the same time
                os.link(draft, self.file)
            except FileExistsError:
                return False
            except OSError:
                return self._create_without_links()
        return True

    def _create_without_links(self) -> bool:
        try:
            with self.file.open("x", encoding="utf-8") as file:
                file.write(self._content())
        except FileExistsError:
            return False
        return True

    def _content(self) -> str:
        return json.dumps(asdict(self.holder))

    @contextlib.contextmanager
    def _draft(self) -> Iterator[Path]:
        draft = self.file.with_name(f".{LOCK_FILE}.{self.holder.token}")
        try:
            draft.write_text(self._content(), encoding="utf-8")
            yield draft
        finally:
            draft.unlink(missing_ok=True)

    def _take_over(self, seen: Seen) -> bool:
        """Replace the lock file of a dead process. Return False if a third process changed the file first."""
        with _folder_lock(self.folder):
            if self._read() != seen:
                return False
            with self._draft() as draft:
                draft.replace(self.file)
        return True

    def _wait_until_gone(self, seen: Seen) -> None:
        """Wait until the holder is dead or the lock file names another holder. Raise ValueError if the holder lives."""
        is_gone = seen.holder and seen.holder.is_gone(self.holder)
        if is_gone is False:
            raise self._refusal(seen)
        if is_gone:
            return
        # hosts' clocks may differ, so the file is watched for two renewals at least
        left = max(2 * RENEWAL_SECONDS, STALE_SECONDS - (self._now() - seen.renewed))
        if left > 0:
            self.say(f"waiting    up to {left:.0f} s, to see whether {seen.holder or self.file} is still active")
        end = time.monotonic() + left
        while time.monotonic() < end:
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))
            now = self._read()
            if now is None or now.token != seen.token:
                return
            if now.renewed != seen.renewed:
                raise self._refusal(seen)

    def _refusal(self, seen: Seen) -> ValueError:
        return ValueError(
            f"{self.folder}: another run uses this folder ({seen.holder or 'an unknown process'}); wait until that run "
            f"ends, stop that run by creating the file {self.folder / 'stop'}, or give another --output_dir"
        )

    def _now(self) -> float:
        """Return the current time of the file system's clock, which also sets the modification times of lock files."""
        with tempfile.TemporaryFile(dir=self.folder) as probe:
            return os.fstat(probe.fileno()).st_mtime

    def _keep_renewing(self) -> None:
        while not self._released.wait(RENEWAL_SECONDS):
            self.renew()


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_running(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        is_same = abs(process.create_time() - started) < CLOCK_TOLERANCE_SECONDS
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time take over a lock, if the file system supports flock on folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
