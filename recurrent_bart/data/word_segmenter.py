"""Word segmentation of Japanese texts, for models whose vocabulary has Japanese words with spaces between them.

Run as a program, this file segments standard input: the first line is the segmenter's name, each further line a text.
The file imports nothing of the package, because these processes must start fast.
"""

import functools
import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import regex

SEGMENTERS = ("none", "jumanpp", "mecab", "sudachi")
# Argument of a tokenizer that names its segmenter; Hugging Face saves it in tokenizer_config.json.
SETTING = "word_segmenter"
# Packages of each segmenter; the alternatives of one line are dictionaries.
PACKAGES = {"mecab": ("fugashi", "unidic", "unidic-lite"), "sudachi": ("sudachipy", "sudachidict_core")}
REMEDIES = {
    "jumanpp": "install Juman++ 2 (https://github.com/ku-nlp/jumanpp), so that the program jumanpp is on the PATH",
    "mecab": "run pip install fugashi unidic-lite",
    "sudachi": "run pip install sudachipy sudachidict_core",
}
# Letters and signs of Japanese text. Full-width Latin letters and digits are written with spaces, as Hangul is.
JAPANESE = r"[[\p{ea=W}\p{ea=F}\p{ea=H}]--[\p{Hangul}\p{Emoji_Presentation}\p{scx=Latin}\p{Nd}\s]]"
HAS_JAPANESE = regex.compile(JAPANESE, regex.VERSION1)
BETWEEN_WORDS = regex.compile(rf"(?<={JAPANESE})[ \t]+(?=\S)|(?<=\S)[ \t]+(?={JAPANESE})", regex.VERSION1)
NO_BOUNDARY = regex.compile(rf"(?<!{JAPANESE}) (?!{JAPANESE})", regex.VERSION1)
BESIDE_JAPANESE = regex.compile(rf"(?<={JAPANESE})|(?={JAPANESE})", regex.VERSION1)
SPACED_LETTERS = regex.compile(rf"(?<={JAPANESE}) (?={JAPANESE})", regex.VERSION1)
# More spaces than this per Japanese letter: the text is segmented into words.
SEGMENTED_SHARE = 0.2
# Texts are segmented in parts without white space: sentences, or 1,000 characters (Juman++ reads 4,096 bytes).
SIGN = rf"(?:[。｡！？]|．(?!\p{{Nd}})|(?<={JAPANESE})[!?])"
END = rf"{SIGN}{{1,8}}[」』）〉》】］]{{0,8}}"
PART = regex.compile(rf"(?:(?!{SIGN})\S){{1,1000}}(?:{END})?|{END}", regex.VERSION1)
# Characters that are worth the start of a process.
PROCESS_CHARACTERS = 200_000
SEGMENTING = threading.Lock()


class WordSegmenter:
    """Segmenter that puts one space between the Japanese words of a text. All other text stays as it is.

    A sentence is segmented by itself, so the words do not depend on the text around it. Raise ValueError if the
    segmenter `name` is not installed. `n_processes` processes segment large texts.
    """

    def __init__(self, name: str, n_processes: int = 1):
        check_installed(name)
        self.name, self.n_processes = name, n_processes
        self._known: dict[str, str] = {}

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """Return the texts with spaces between words."""
        spaced = self._known | self._spaced(texts)
        return [_put_spaces(text, spaced) for text in texts]

    def remember(self, texts: Sequence[str]) -> None:
        """Segment texts with one start of the segmenter, and keep the results for later calls."""
        self._known |= self._spaced(texts)

    def _spaced(self, texts: Sequence[str]) -> dict[str, str]:
        """Return the parts of texts that are not known yet, each with the same part after segmentation."""
        found = (part[0] for text in texts for part in PART.finditer(text))
        parts = [part for part in dict.fromkeys(found) if part not in self._known and HAS_JAPANESE.search(part)]
        return dict(zip(parts, self._segment(parts), strict=True))

    def _segment(self, parts: list[str]) -> list[str]:
        n_processes = min(self.n_processes, sum(map(len, parts)) // PROCESS_CHARACTERS)
        if n_processes < 2:
            return _segment_parts(self.name, parts)
        size = -(-len(parts) // n_processes)
        shares = [[self.name, *parts[start : start + size]] for start in range(0, len(parts), size)]
        with ThreadPoolExecutor(n_processes) as threads:
            lines = threads.map(lambda share: _run([sys.executable, "-P", __file__], share, len(share) - 1), shares)
            return list(itertools.chain.from_iterable(lines))


def n_available_processes() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def segmenter_of(tokenizer: Any) -> str:
    """Return the name of the segmenter that is saved with a tokenizer, `"none"` without one."""
    return getattr(tokenizer, "init_kwargs", {}).get(SETTING) or "none"


def joins_words(tokenizer: Any) -> bool:
    """Return True if decoded texts have spaces between Japanese words: the tokenizer, or a segmenter, puts them."""
    return segmenter_of(tokenizer) != "none" or segments_itself(tokenizer)


def segments_itself(tokenizer: Any) -> bool:
    """Return True for tokenizers that segment words themselves, as BertJapaneseTokenizer does."""
    return getattr(tokenizer, "word_tokenizer_type", None) not in (None, "basic")


def join_words(text: str) -> str:
    """Remove the spaces beside Japanese letters. Spaces between words of other scripts stay."""
    return BETWEEN_WORDS.sub("", text)


def is_segmented(text: str) -> bool:
    """Return True if the Japanese words of a text have spaces between them already."""
    n_letters = sum(1 for _ in HAS_JAPANESE.finditer(text))
    return sum(1 for _ in SPACED_LETTERS.finditer(text)) > SEGMENTED_SHARE * n_letters


def check_installed(name: str, flag: str = f"--{SETTING}") -> None:
    """Raise ValueError, with the remedy, if a segmenter is unknown or not installed."""
    if name not in SEGMENTERS:
        raise ValueError(f"{flag} {name}: allowed are {', '.join(SEGMENTERS)}")
    if name == "none":
        return
    there = shutil.which("jumanpp") if name == "jumanpp" else _versions(name)[1:]
    if not there:
        raise ValueError(f"{flag} {name}: it is not installed; {REMEDIES[name]}")


def segmenter_version(name: str) -> str:
    """Return the versions of a segmenter and its dictionary, which decide the words."""
    if name == "jumanpp":
        shown = subprocess.run(["jumanpp", "--version"], capture_output=True, text=True, errors="replace", timeout=60)
        return (shown.stdout + shown.stderr).strip()
    return " ".join(_versions(name))


def _versions(name: str) -> list[str]:
    """Return the versions of the installed packages of a segmenter; empty if its program is not installed."""
    found = []
    for number, package in enumerate(PACKAGES.get(name, ())):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            if number == 0:
                return []
    return found


def _put_spaces(text: str, spaced: dict[str, str]) -> str:
    """Return a text with its parts replaced by `spaced`, and a space between a part and a Japanese neighbour."""
    found, end = [], 0
    for part in PART.finditer(text):
        if end == part.start() > 0 and BESIDE_JAPANESE.match(text, end):
            found.append(" ")
        found += [text[end : part.start()], spaced.get(part[0], part[0])]
        end = part.end()
    return "".join([*found, text[end:]])


def _segment_parts(name: str, parts: Sequence[str]) -> list[str]:
    """Return the parts with spaces between words. A part that the segmenter changes otherwise stays as it is."""
    # a segmenter serves one thread at a time
    with SEGMENTING:
        lines = [" ".join(line.split()) for line in (_segmenter_of(name)(parts) if parts else [])]
    return [
        NO_BOUNDARY.sub("", line) if line.replace(" ", "") == part else part
        for part, line in zip(parts, lines, strict=True)
    ]


@functools.cache
def _segmenter_of(name: str) -> Callable[[Sequence[str]], list[str]]:
    """Load a segmenter, which maps texts without white space to their words with spaces between them."""
    if name == "jumanpp":
        return _jumanpp
    if name == "mecab":
        import fugashi

        tagger = fugashi.Tagger("-Owakati")
        return lambda texts: [tagger.parse(text) for text in texts]
    from sudachipy import Dictionary, SplitMode

    tokenizer = Dictionary().tokenizer(SplitMode.C)
    return lambda texts: [" ".join(word.surface() for word in tokenizer.tokenize(text)) for text in texts]


def _jumanpp(texts: Sequence[str]) -> list[str]:
    return _run(["jumanpp", "--segment"], texts, len(texts))


def _run(command: list[str], lines: Sequence[str], n_lines: int) -> list[str]:
    """Run a program on lines; return the lines that it prints. Raise ValueError if it fails."""
    done = subprocess.run(command, input="".join(f"{line}\n" for line in lines).encode(), capture_output=True)
    printed = done.stdout.decode(errors="replace").removesuffix("\n").split("\n") if n_lines else []
    if done.returncode or len(printed) != n_lines:
        reason = " ".join(done.stderr.decode(errors="replace").split()[-40:])
        raise ValueError(
            f"{' '.join(command)}: the word segmenter ended with code {done.returncode} and gave {len(printed)} lines "
            f"for {n_lines} texts ({reason or 'no message'})"
        )
    return printed


def _lines(file: Any) -> Iterator[str]:
    for line in file:
        yield line.decode().removesuffix("\n")


def _serve() -> None:
    """Segment standard input."""
    name, *texts = _lines(sys.stdin.buffer)
    sys.stdout.buffer.write("".join(f"{line}\n" for line in _segment_parts(name, texts)).encode())


if __name__ == "__main__":
    _serve()
