"""Summarise texts of any length: `python launch/summarize.py --model RUN/model FILE`."""

import argparse
import contextlib
import itertools
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO

import torch
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from recurrent_bart.commands.exit_codes import print_mistake
from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.inference.input_texts import (
    STANDARD_INPUT,
    Text,
    all_texts,
    open_file,
    pass_over,
    split_sections,
    text_pieces,
)
from recurrent_bart.inference.stream_reader import TextReader, run_flags
from recurrent_bart.inference.summarizer import EncodedTexts, Summarizer
from recurrent_bart.model.generation_settings import describe_settings
from recurrent_bart.training.flags import FlagParser
from recurrent_bart.training.generation_arguments import GenerationArguments, add_generation_flags

# Number of texts that are summarised together, texts of similar length in a batch. As many again are encoded meanwhile.
WINDOW = 256
# Number of segments in the decoder's context from which the growing context costs noticeable time.
MANY_SEGMENTS = 16
GROWING = (
    "note: each summary attends to all segments so far, so it takes longer than the one before; "
    f"--context_segments {MANY_SEGMENTS} bounds this"
)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the flags of this script."""
    parser = FlagParser(description="Summarise texts of any length.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="UTF-8 text file; default: standard input")
    parser.add_argument("--model", required=True, help="folder of the model: RUN/model")
    parser.add_argument(
        "--every_segment", action="store_true", help="print a summary after each segment, as soon as it is read"
    )
    parser.add_argument(
        "--context_segments",
        type=positive,
        metavar="N",
        help="let summaries attend to the last N segments only, so that --every_segment keeps its speed; default: the "
        "model's own value",
    )
    parser.add_argument(
        "--section_separator",
        type=separator,
        metavar="LINE",
        help="print a summary after each section; a line that is equal to LINE ends a section",
    )
    parser.add_argument("--each_line", action="store_true", help="treat each line as a separate text")
    parser.add_argument(
        "--query",
        default="",
        help="question about each text, for a model that was trained with --query_column; default: none",
    )
    parser.add_argument(
        "--tokens_per_batch",
        type=positive,
        default=16_384,
        help="maximum number of tokens in a batch of several texts, padding included; default: %(default)s",
    )
    add_generation_flags(parser)
    parser.add_argument("--seed", type=int, default=42, help="seed of the texts drawn with --do_sample; default: 42")
    parser.add_argument(
        "--skip_bad_samples", action="store_true", help="skip unreadable texts and print an empty line for each"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code from the tokenizer's folder")
    parser.add_argument(
        "--save_state",
        type=Path,
        metavar="FILE",
        help="save the state after the text, to continue with more text later",
    )
    parser.add_argument(
        "--load_state", type=Path, metavar="FILE", help="continue from a saved state: the text follows the earlier text"
    )
    return parser.parse_flags(argv)


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, at least 1")
    return int(text)


def separator(text: str) -> str:
    """Parse a line that separates sections."""
    if not text.strip() or len(text.splitlines()) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be one line that is not blank")
    return text.strip()


class Progress:
    """Progress line on standard error: tokens and segments read, and speed.

    Args:
        reader: Reader whose counters are shown.
        in_place: Overwrite one line, as on a terminal; otherwise print a line every 10 seconds.
    """

    def __init__(self, reader: TextReader, in_place: bool):
        self.reader, self.start = reader, time.monotonic()
        self.in_place = in_place
        self.every_seconds = 0.2 if in_place else 10.0
        self.shown_at = self.start

    def show(self, is_last: bool = False) -> None:
        """Print the progress if it is due."""
        now = time.monotonic()
        if not is_last and now - self.shown_at < self.every_seconds:
            return
        self.shown_at = now
        tokens, segments = self.reader.n_tokens, self.reader.n_segments
        speed = tokens / max(now - self.start, 1e-9)
        line = f"read {tokens:,} tokens in {segments:,} segments, {speed:,.0f} tokens/s"
        start, end = ("\r", "\n" if is_last else "") if self.in_place else ("", "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)


def load(arguments: argparse.Namespace) -> Summarizer:
    """Load the model with the given settings of generation.

    Raises:
        ValueError: The model is unusable.
    """
    flags = {item.name: getattr(arguments, item.name) for item in fields(GenerationArguments)}
    summarizer = Summarizer.from_pretrained(
        arguments.model,
        tokens_per_batch=arguments.tokens_per_batch,
        trust_remote_code=arguments.trust_remote_code,
        query=arguments.query,
        **GenerationArguments(**flags).generation_settings(),
    )
    if arguments.context_segments:
        bound_context(summarizer.model.config, arguments.context_segments)
    if note := missing_query(arguments.model, arguments.query, brings_query=bool(arguments.load_state)):
        print(f"warning: {note}", file=sys.stderr, flush=True)
    torch.manual_seed(arguments.seed)
    return summarizer


def bound_context(config: RecurrentBartConfig, n_segments: int) -> None:
    """Let the decoder attend to the last `n_segments` segments only.

    Raises:
        ValueError: The decoder's context does not grow with the text.
    """
    if config.decoder_context == "last":
        raise ValueError(
            f"--context_segments {n_segments}: the model's decoder_context is {config.decoder_context}, which does not "
            "grow with the text; remove the flag"
        )
    config.context_segments = n_segments


def missing_query(model_folder: str, query: str, brings_query: bool = False) -> str:
    """Return a warning if texts are read without a question, or with one, unlike in the model's training.

    `brings_query` is True if a saved state may bring a question.
    """
    flags = run_flags(model_folder)
    column = flags.get("data", {}).get("query_column")
    if column and not query.strip() and not brings_query:
        return f"the model was trained with questions (--query_column {column}); give one with --query"
    if query.strip() and not column and flags:
        return "--query: the model was trained without questions, so it may not answer them"
    return ""


def show_settings(summarizer: Summarizer) -> None:
    """Print the generation settings on standard error."""
    line = describe_settings(summarizer.model.generation_config, summarizer.generation["max_new_tokens"])
    print(line, file=sys.stderr, flush=True)


def summarize(arguments: argparse.Namespace, file: BinaryIO, name: str) -> None:
    """Summarise one text: print its summary, or a summary after each section or segment, and save the state.

    Raises:
        ValueError: The model, the text or a state file is unusable.
    """
    save_state = arguments.save_state
    if save_state and not save_state.absolute().parent.is_dir():
        raise ValueError(f"--save_state {save_state}: the folder {save_state.parent} does not exist")
    if arguments.skip_bad_samples:
        raise ValueError("--skip_bad_samples: needs several texts (several files or --each_line)")
    summarizer = load(arguments)
    reader = summarizer.open(segments_per_call=1 if arguments.every_segment else None).reader
    if arguments.load_state:
        reader.load(arguments.load_state)
    prints_several = arguments.every_segment or arguments.section_separator
    progress = Progress(reader, in_place=sys.stderr.isatty() and not prints_several)
    is_shown = is_told = False
    # without new text, the summary is of the earlier text
    pieces = text_pieces(file, name, may_be_blank=bool(arguments.load_state))
    for output in outputs(reader, pieces, arguments.section_separator):
        if not is_shown:
            show_settings(summarizer)
            is_shown = True
        progress.show()
        if arguments.every_segment or reader.is_between_sections:
            print(summarizer.summary_after(output), flush=True)
        if arguments.every_segment and not is_told and grows(summarizer.model.config, reader):
            is_told = True
            print(GROWING, file=sys.stderr, flush=True)
    progress.show(is_last=True)
    # no separator follows the last section
    if not (arguments.every_segment or reader.is_between_sections):
        print(summarizer.summary_after(output), flush=True)
    if save_state:
        reader.save(save_state)


def grows(config: RecurrentBartConfig, reader: TextReader) -> bool:
    """Return True if each summary attends to many segments, and to more segments than the previous summary."""
    return config.decoder_context == "all" and config.context_segments == -1 and reader.n_segments >= MANY_SEGMENTS


def summarize_all(arguments: argparse.Namespace) -> None:
    """Summarise several texts: print one line per text, in order.

    Raises:
        ValueError: The model or a text is unusable, or a flag applies to a single text only.
    """
    for flag in ("every_segment", "section_separator", "save_state", "load_state"):
        if getattr(arguments, flag):
            raise ValueError(f"--{flag}: needs one text, not several")
    summarizer = load(arguments)
    texts = all_texts(arguments.files, arguments.each_line, arguments.skip_bad_samples)
    is_shown = False
    windows = iter(lambda: list(itertools.islice(texts, WINDOW)), [])
    encoded_windows = summarizer.encode_ahead(windows, lambda window: [[text.content for text in readable(window)]])
    for window, encoded in encoded_windows:
        if not is_shown:
            show_settings(summarizer)
            is_shown = True
        for summary in summarize_window(summarizer, window, encoded, arguments.skip_bad_samples):
            print(" ".join(summary.split()), flush=True)


def readable(window: list[Text]) -> list[Text]:
    """Return the texts that are not passed over."""
    return [text for text in window if not text.is_passed_over]


def summarize_window(
    summarizer: Summarizer, window: list[Text], encoded: EncodedTexts | None, skips: bool
) -> Iterator[str]:
    """Yield the summary of each text. A skipped text has an empty summary.

    `encoded` has the tokens of the readable texts. With None, each text is summarised by itself.

    Raises:
        ValueError: A text has no tokens. The message names the text.
    """
    # summarise each text by itself to find an unusable text
    summaries = (summarize_alone(summarizer, text, skips) for text in readable(window))
    if encoded is not None:
        with contextlib.suppress(ValueError):
            summaries = (str(summary) for summary in summarizer.summarize(encoded))
    for text in window:
        yield "" if text.is_passed_over else next(summaries)


def summarize_alone(summarizer: Summarizer, text: Text, skips: bool) -> str:
    """Return the summary of one text, or an empty summary if the text is skipped.

    Raises:
        ValueError: The text has no tokens; the message names it.
    """
    try:
        return str(summarizer(text.content))
    except ValueError as error:
        pass_over(ValueError(f"{text.name}: {error}"), skips)
        return ""


def outputs(reader: TextReader, pieces: Iterator[str], separator: str | None) -> Iterator[BaseModelOutput]:
    """Yield the reader's encoder outputs. The last output covers the whole text, or its last section."""
    if separator is None:
        for piece in pieces:
            yield from reader.feed(piece)
    else:
        for part in split_sections(pieces, separator):
            if part is None:
                yield from reader.end_section()
            else:
                # a section begins without the blank lines behind a separator
                yield from reader.feed(part.lstrip() if reader.is_between_sections else part)
    if not reader.is_between_sections or reader.bookmark.state is None:
        yield from reader.finish()


def main(argv: list[str]) -> int:
    """Summarise one text or several texts. Return the exit code."""
    arguments = parse_arguments(argv)
    logging.disable_progress_bar()
    try:
        if arguments.each_line or len(arguments.files) > 1:
            summarize_all(arguments)
        elif not arguments.files:
            summarize(arguments, sys.stdin.buffer, STANDARD_INPUT)
        else:
            with open_file(arguments.files[0]) as file:
                summarize(arguments, file, arguments.files[0])
    except ValueError as error:
        return print_mistake(error)
    except OSError as error:
        # For example, the disk of standard output is full.
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def run(argv: list[str]) -> int:
    """Run the command as a process. Return the exit code."""
    # End silently after `| head`, as other programs do.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    return main(argv)
