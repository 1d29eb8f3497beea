"""Files and folders that are complete or absent, and hashes of values."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def atomic_write(path: Path, text: str) -> None:
    """Write a file atomically. A reader finds the old or the new content, also after a crash of the host."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    replace_and_fsync(draft, path)


def replace_and_fsync(draft: Path, path: Path) -> None:
    """Replace a file by a written draft in the same folder, so that the new content survives a crash of the host."""
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, path)
    fsync_directory(path.parent)


def fsync_directory(folder: Path) -> None:
    """Fsync one folder, so that its list of files survives a crash of the host."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_directory(folder: Path, replaces: bool = False) -> Iterator[Path]:
    """Create a temporary folder and rename it to `folder` at the end of the block.

    `folder` is then complete, also after a crash of the host.

    If several processes write the same folder, the folder of the first process to finish stays. With `replaces`, the
    new folder replaces an old folder.

    Raises:
        ValueError: The parent folder is not writable.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise ValueError(f"{folder.parent}: cannot be written ({error.strerror})") from error
    old = draft.with_name(draft.name + ".old")
    try:
        yield draft
        _give_usual_modes(draft)
        _fsync_all(draft)
        if replaces and folder.exists():
            folder.rename(old)
        _rename_unless_there(draft, folder)
        fsync_directory(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _fsync_all(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            fsync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _give_usual_modes(draft: Path) -> None:
    """Set the modes that the umask gives to new files. Some libraries, and mkdtemp, let only the owner read."""
    probe = draft / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in draft.rglob("*"):
        path.chmod(_of_folder(mode) if path.is_dir() else mode)
    draft.chmod(_of_folder(mode))


def _of_folder(mode: int) -> int:
    # whoever may read the files may enter the folder
    return mode | (mode & 0o444) >> 2


def _rename_unless_there(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        # Another process renamed its folder first, or the disk failed.
        if not folder.is_dir():
            raise


def fingerprint(*parts: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of JSON-serialisable values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
