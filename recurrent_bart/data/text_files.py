"""Text files in any encoding, with line numbers for bytes that cannot be decoded."""

import gzip
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

# utf-8-sig drops the byte order mark of spreadsheets, which would become part of the first column's name.
ENCODING = "utf-8-sig"
# `surrogateescape` turns each undecodable byte into one of these characters.
UNDECODED = re.compile(r"[\udc80-\udcff]")


def with_line_feeds(text: str, is_start: bool = True, follows_return: bool = False) -> str:
    """Return a text as `read_text` reads it: a line feed ends each line, and no byte order mark begins the text.

    Args:
        is_start: The text is the beginning of a document, not a later piece.
        follows_return: The piece before ended with a carriage return, which was already read as a line feed.
    """
    if is_start:
        text = text.removeprefix("\ufeff")
    if follows_return:
        text = text.removeprefix("\n")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_encoding(name: str) -> str:
    """Return the codec of an encoding's name (for UTF-8, utf-8-sig). Raise ValueError if Python has none."""
    try:
        "".encode(name)
    except LookupError:
        raise ValueError(
            f"--encoding {name}: unknown encoding; examples are utf-8, utf-16, latin-1, cp1252, shift_jis"
        ) from None
    return ENCODING if name.lower().replace("_", "-") in ("utf-8", "utf8") else name


@contextmanager
def open_text(path: Path, encoding: str = ENCODING, newline: str | None = "\n") -> Iterator[TextIO]:
    """Open a text file, plain or gzip. Undecodable bytes raise no error here; `check_decoded` finds them."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        yield io.TextIOWrapper(file, encoding, errors="surrogateescape", newline=newline)


def check_decoded(text: str, encoding: str) -> None:
    """Raise ValueError if a text from `open_text` contains an undecodable byte; the message gives its value."""
    undecoded = UNDECODED.search(text)
    if undecoded:
        name = "utf-8" if encoding == ENCODING else encoding
        byte = ord(undecoded[0]) - 0xDC00
        raise ValueError(f"byte 0x{byte:02x} is not {name}; give the encoding of the file with --encoding")


def read_text(path: Path, encoding: str = ENCODING) -> str:
    """Return the text of a file with a line feed at the end of each line.

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
