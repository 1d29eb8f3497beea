"""Text files in any encoding, in which a byte that cannot be decoded is found with its line."""

import gzip
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

# spreadsheets put a byte order mark in front, which would become part of the first column's name
ENCODING = "utf-8-sig"
# Python's `surrogateescape` turns each byte that cannot be decoded into one of these
UNDECODED = re.compile(r"[\udc80-\udcff]")


def check_encoding(name: str) -> str:
    """Return the encoding that Python reads files of this name with; UTF-8 may have a byte order mark.

    Raises:
        ValueError: Python has no text encoding of this name.
    """
    try:
        "".encode(name)
    except LookupError:
        raise ValueError(
            f"--encoding {name}: unknown encoding; examples are utf-8, utf-16, latin-1, cp1252, shift_jis"
        ) from None
    return ENCODING if name.lower().replace("_", "-") in ("utf-8", "utf8") else name


@contextmanager
def open_text(path: Path, encoding: str = ENCODING, newline: str | None = "\n") -> Iterator[TextIO]:
    """Open a text file, or a text file that gzip compressed.

    `check_decoded` finds the bytes that the encoding cannot decode.

    Args:
        path: The file.
        encoding: Name that Python knows.
        newline: As in `open`.
    """
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        yield io.TextIOWrapper(file, encoding, errors="surrogateescape", newline=newline)


def check_decoded(text: str, encoding: str) -> None:
    """Check that every byte of a text from `open_text` was decoded.

    Raises:
        ValueError: A byte was not; the message gives its value.
    """
    undecoded = UNDECODED.search(text)
    if undecoded:
        name = "utf-8" if encoding == ENCODING else encoding
        byte = ord(undecoded[0]) - 0xDC00
        raise ValueError(f"byte 0x{byte:02x} is not {name}; --encoding names the encoding of the file")


def read_text(path: Path, encoding: str = ENCODING) -> str:
    """Return the text of a file, with a line feed at the end of each line.

    Raises:
        ValueError: The file cannot be read or decoded; the message names it.
    """
    try:
        with open_text(path, encoding, newline=None) as file:
            text = file.read()
        check_decoded(text, encoding)
    except OSError as error:
        raise ValueError(f"{path}: unreadable ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: unreadable ({error})") from error
    return text
