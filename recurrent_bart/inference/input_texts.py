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
        byte = error.object[error.start]
        raise ValueError(f"{name}: not a UTF-8 text ({error.reason}: byte 0x{byte:02x})") from error
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror})") from error
    if is_blank and not may_be_blank:
        raise ValueError(f"{name}: the text is empty")


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

    Raises:
        ValueError: A text is unreadable or empty. The message names the text.
    """
    for name in files or [STANDARD_INPUT]:
        try:
            with open_file(name) if files else sys.stdin.buffer as file:
                text = "".join(text_pieces(file, name))
        except ValueError as error:
            pass_over(error, skips)
            yield Text(name, "")
            continue
        lines = text.removesuffix("\n").split("\n") if each_line else [text]
        for number, line in enumerate(lines, start=1):
            place = f"{name}:{number}" if each_line else name
            if not line.strip():
                pass_over(ValueError(f"{place}: the text is empty"), skips)
            yield Text(place, line)


def pass_over(error: ValueError, skips: bool) -> None:
    """Print a warning about a skipped text.

    Raises:
        ValueError: `skips` is False.
    """
    if not skips:
        raise ValueError(f"{error}; add --skip_bad_samples to skip this text") from error
    print(f"warning: {error}; this text is skipped", file=sys.stderr, flush=True)
