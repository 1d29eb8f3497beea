"""Manifest of a checkpoint: size and checksum of each file.

Each rank hashes its files during the write, and then writes `part-RANK.json`. When the parts of all ranks exist, the
last rank joins them into `manifest.json`. A folder with `manifest.json` is complete, because this file is written last.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from recurrent_bart.files import fsync_directory

MANIFEST = "manifest.json"
# number of bytes read at once when a file is hashed, 4 MiB
CHUNK_BYTES = 1 << 22


class HashedFile:
    """File that is written sequentially and hashed at the same time."""

    def __init__(self, file: IO[bytes]):
        self.file, self.n_bytes, self.hash = file, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write bytes, update the hash, and return the number of bytes written."""
        self.hash.update(data)
        self.n_bytes += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        """Flush the buffer of the file."""
        self.file.flush()

    def record(self) -> dict[str, Any]:
        """Return the number of bytes written and their SHA-256 checksum."""
        return {"bytes": self.n_bytes, "sha256": self.hash.hexdigest()}


def write_and_fsync(path: Path, write: Callable[[Any], Any]) -> dict[str, Any]:
    """Write and fsync a file. Return its size and checksum. `write` is called with the open file."""
    with path.open("wb") as file:
        hashed = HashedFile(file)
        write(hashed)
        file.flush()
        os.fsync(file.fileno())
    return hashed.record()


def write_json(path: Path, content: Any) -> dict[str, Any]:
    """Write and fsync content as JSON. Return the size and checksum of the file."""
    return write_and_fsync(path, lambda file: file.write(json.dumps(content, indent=2).encode()))


def write_part(folder: Path, rank: int, files: Mapping[str, dict[str, Any]]) -> None:
    """Write the list of all files that one rank has written."""
    draft = folder / f".part-{rank}"
    write_json(draft, files)
    draft.rename(folder / f"part-{rank}.json")


def has_all_parts(folder: Path, n_processes: int) -> bool:
    """Return True if every rank has written its files."""
    return all((folder / f"part-{rank}.json").exists() for rank in range(n_processes))


def join_parts(folder: Path, n_processes: int, **facts: Any) -> None:
    """Join all ranks' lists of files into the folder's manifest. `facts` are additional fields of the manifest."""
    files: dict[str, Any] = {}
    parts = [folder / f"part-{rank}.json" for rank in range(n_processes)]
    for part in parts:
        files |= json.loads(part.read_text())
    write_json(folder / MANIFEST, {**facts, "files": files})
    for part in parts:
        part.unlink()
    for directory in {folder, *((folder / name).parent for name in files)}:
        fsync_directory(directory)


def problems(folder: Path, share: slice = slice(None)) -> list[str]:
    """Return one message for each damaged or missing file of a checkpoint. An empty list means no damage.

    `share` selects part of the sorted list of files, so that ranks can divide the work.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        listed = sorted((name, record["bytes"], record["sha256"]) for name, record in files.items())
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"{MANIFEST} is unreadable ({error})"]
    return list(_file_problems(folder, listed[share]))


def _file_problems(folder: Path, listed: Iterable[tuple[str, int, str]]) -> Iterable[str]:
    for name, n_bytes, sha256 in listed:
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            yield f"{name} is outside the checkpoint's folder"
            continue
        try:
            found = file.stat().st_size
            if found != n_bytes:
                yield f"{name} is incomplete ({found} of {n_bytes} bytes)"
            elif _sha256(file) != sha256:
                yield f"{name} is damaged (its checksum differs from the checksum in {MANIFEST})"
        except FileNotFoundError:
            yield f"{name} is missing"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
