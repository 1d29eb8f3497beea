"""What a checkpoint consists of: size and checksum of each of its files.

Each process hashes what it writes while it writes it, and leaves `part-RANK.json`. When the part of every process is
there the parts become `manifest.json`, so a folder that has one is whole.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

MANIFEST = "manifest.json"
# read and hashed at a time
CHUNK_BYTES = 1 << 22


class HashedFile:
    """A file that is written from its beginning to its end, hashed on the way."""

    def __init__(self, file: IO[bytes]):
        self.file, self.n_bytes, self.hash = file, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write bytes."""
        self.hash.update(data)
        self.n_bytes += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self.file.flush()

    def record(self) -> dict[str, Any]:
        """Size and checksum so far."""
        return {"bytes": self.n_bytes, "sha256": self.hash.hexdigest()}


def write_and_fsync(path: Path, write: Callable[[Any], Any]) -> dict[str, Any]:
    """Write a file so that it outlasts the machine's next moment; its size and checksum.

    Args:
        path: The file.
        write: Called with a file to write into.
    """
    with path.open("wb") as file:
        hashed = HashedFile(file)
        write(hashed)
        file.flush()
        os.fsync(file.fileno())
    return hashed.record()


def write_json(path: Path, content: Any) -> dict[str, Any]:
    """`write_and_fsync` of something as JSON."""
    return write_and_fsync(path, lambda file: file.write(json.dumps(content, indent=2).encode()))


def fsync_directories(folder: Path) -> None:
    """What a folder lists outlasts the machine's next moment too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_part(folder: Path, rank: int, files: Mapping[str, dict[str, Any]]) -> None:
    """Say which files a process has written, all of them."""
    draft = folder / f".part-{rank}"
    write_json(draft, files)
    draft.rename(folder / f"part-{rank}.json")


def has_all_parts(folder: Path, n_processes: int) -> bool:
    """Whether every process has written its files."""
    return all((folder / f"part-{rank}.json").exists() for rank in range(n_processes))


def join_parts(folder: Path, n_processes: int, **facts: Any) -> None:
    """Make the parts of all processes the folder's manifest, with further facts."""
    files: dict[str, Any] = {}
    parts = [folder / f"part-{rank}.json" for rank in range(n_processes)]
    for part in parts:
        files |= json.loads(part.read_text())
    write_json(folder / MANIFEST, {**facts, "files": files})
    for part in parts:
        part.unlink()
    for place in {folder, *((folder / name).parent for name in files)}:
        fsync_directories(place)


def problems(folder: Path, share: slice = slice(None)) -> list[str]:
    """What is wrong with the files of a checkpoint, each named; empty if it is whole.

    Args:
        folder: The checkpoint.
        share: Which of its files to read, so that processes can divide them.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        listed = sorted((name, record["bytes"], record["sha256"]) for name, record in files.items())
    except FileNotFoundError:
        return [f"there is no {MANIFEST}"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"{MANIFEST} is unreadable ({error})"]
    return list(_wrong(folder, listed[share]))


def _wrong(folder: Path, listed: Iterable[tuple[str, int, str]]) -> Iterable[str]:
    for name, n_bytes, sha256 in listed:
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            yield f"{name} is outside of it"
            continue
        try:
            found = file.stat().st_size
            if found != n_bytes:
                yield f"{name} is incomplete ({found} of {n_bytes} bytes)"
            elif _sha256(file) != sha256:
                yield f"{name} is damaged (its checksum is not the manifest's)"
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror})"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
