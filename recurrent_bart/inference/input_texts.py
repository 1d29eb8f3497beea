"""Texts of files and of standard input: read in pieces, in sections, or as several texts."""

import codecs
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from recurrent_bart.data.text_files import ENCODING

STANDARD_INPUT = "standard input"
# Number of bytes that one call of read returns at most.
BLOCK = 2**16


def open_file(name: str) -> BinaryIO:
    """Open a file for reading.

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        return Path(name).open("rb")
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror})") from error


def text_pieces(file: BinaryIO, name: str, may_be_blank: bool = False) -> Iterator[str]:
    """Yield the text of a file in pieces, each as soon as it arrives. All line ends become a newline character.

    Raises:
        ValueError: The file is not UTF-8, or contains only white space without `may_be_blank`; the message names the
            file.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(ENCODING)(), translate=True)
    read = getattr(file, "read1", file.read)
    is_blank, data = True, b" "
    try:
        while data:
            data = read(BLOCK)
            text = decoder.decode(data, final=not data)
            is_blank = is_blank and not text.strip()
            yield text
    except UnicodeDecodeError as error:
        raise _undecodable(error, name) from error
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror})") from error
    if is_blank and not may_be_blank:
        raise ValueError(f"{name}: the text is empty")


def _undecodable(error: UnicodeDecodeError, name: str) -> ValueError:
    byte = error.object[error.start]
    return ValueError(f"{name}: not a UTF-8 text ({error.reason}: byte 0x{byte:02x})")


def split_sections(pieces: Iterator[str], separator: str) -> Iterator[str | None]:
    """Yield the text without the lines that are equal to `separator`, and None in place of each of them.

    White space around a line is ignored. Text is yielded as soon as it cannot be a part of a separator.
    """
    line, is_line_start = "", True
    for piece in pieces:
        *lines, line = (line + piece).split("\n")
        text = ""
        for ended in lines:
            if is_line_start and ended.strip() == separator:
                yield text
                yield None
                text = ""
            else:
                text += ended + "\n"
            is_line_start = True
        if not is_line_start or not separator.startswith(line.strip()):
            text, line, is_line_start = text + line, "", is_line_start and not line
        yield text
    yield None if is_line_start and line.strip() == separator else line


@dataclass(frozen=True)
class Text:
    """One of several texts. `name` is the file or line that messages show."""

    name: str
    content: str

    @property
    def is_passed_over(self) -> bool:
        """True if the text is blank. The warning about a blank text is already printed."""
        return not self.content.strip()


def all_texts(files: Sequence[str], each_line: bool, skips: bool) -> Iterator[Text]:
    """Yield the text of every file or of every line; without files, of standard input.

    An unusable text is yielded as an empty text, so that texts match files or lines.

    Raises:
        ValueError: A text is unreadable or empty. The message names the text.
    """
    for name in files or [STANDARD_INPUT]:
        try:
            with open_file(name) if files else sys.stdin.buffer as file:
                data = _read(file, name)
        except ValueError as error:
            pass_over(error, skips)
            yield Text(name, "")
            continue
        # A byte that is not UTF-8 makes only its own line unusable.
        lines = data.removesuffix(b"\n").split(b"\n") if each_line else [data]
        for number, line in enumerate(lines, start=1):
            place = f"{name}:{number}" if each_line else name
            try:
                content = _decode(line, place)
            except ValueError as error:
                pass_over(error, skips)
                content = ""
            yield Text(place, content)


def _read(file: BinaryIO, name: str) -> bytes:
    """Return the bytes of a file without a byte order mark, with a newline character for each line end."""
    try:
        data = file.read()
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror})") from error
    return data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _undecodable(error, name) from error
    if not text.strip():
        raise ValueError(f"{name}: the text is empty")
    return text


def pass_over(error: ValueError, skips: bool) -> None:
    """Print a warning about a skipped text.

    Raises:
        ValueError: `skips` is False.
    """
    if not skips:
        raise ValueError(f"{error}; add --skip_bad_samples to skip this text") from error
    print(f"warning: {error}; this text is skipped", file=sys.stderr, flush=True)
