"""Session with a text that arrives in pieces, and can be summarized at any time."""

import copy
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from recurrent_bart.inference.stream_reader import BLOCK, SEGMENTS_PER_CALL, TextReader, summary_after
from recurrent_bart.inference.text_stream import stream_text
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration

Result = TypeVar("Result")
# work that pauses between its steps, so that its caller can do other work or end it, and returns a result
Steps = Generator[None, None, Result]


@dataclass(frozen=True)
class Summary:
    """Summary of a text, and the part of the text that it was made from.

    Attributes:
        n_segments: Segments that the encoder read.
        n_tokens: Tokens that the encoder read, without special tokens and without tokens read again.
        n_cut_tokens: Tokens of the text's end that `max_n_segments` left unread.
    """

    text: str
    n_segments: int
    n_tokens: int
    n_cut_tokens: int = 0

    def __str__(self) -> str:
        return self.text


class ReadingSession:
    """Session with one text. It gives the same summaries as the whole text at once, wherever the text is cut.

    Args:
        model: Model in evaluation mode.
        segments_per_call: Largest number of segments per encoder call.
        generation: Arguments of `generate`.
    """

    def __init__(
        self,
        model: RecurrentBartForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        segments_per_call: int | None = None,
        **generation: Any,
    ):
        self.model, self.tokenizer, self.generation = model, tokenizer, generation
        self.reader = TextReader(model, tokenizer, segments_per_call or SEGMENTS_PER_CALL)

    @property
    def n_characters(self) -> int:
        """Number of characters of the whole text, also of the part that a loaded state covers."""
        return self.reader.bookmark.n_characters

    def add(self, text: str, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Add text. `on_progress` is called with the numbers of tokens and segments read so far."""
        n_segments = self.reader.n_segments
        for _ in self.add_in_steps(text):
            if on_progress is not None and self.reader.n_segments > n_segments:
                n_segments = self.reader.n_segments
                on_progress(self.reader.n_tokens, n_segments)

    def add_in_steps(self, text: str) -> Steps[None]:
        """Add text, and pause after each encoder call and each block of characters.

        A session whose steps are not all done has a part of the text.
        """
        # a section begins without the blank lines after the section before it
        is_later_section = self.reader.is_between_sections and self.reader.bookmark.state is not None
        rest = text.lstrip() if is_later_section else text
        self.reader.bookmark.n_characters += len(text) - len(rest)
        for start in range(0, len(rest), BLOCK):
            for _ in self.reader.feed(rest[start : start + BLOCK]):
                yield
            yield

    def summary(self) -> Summary:
        """Return the summary of the text so far. Later text continues as if this summary had not been asked for.

        Raises:
            ValueError: The text has no tokens.
        """
        return result_of(self.summary_in_steps())

    def summary_in_steps(self) -> Steps[Summary]:
        """Return the summary of the text so far, and pause after each encoder call."""
        output, n_tokens, n_segments = yield from self.read_to_end()
        text = summary_after(output, self.model, self.tokenizer, **self.generation)
        return Summary(text, n_segments, n_tokens)

    def with_generation(self, generation: Mapping[str, Any]) -> Self:
        """Return the session with other arguments of `generate`. Both have the same text."""
        changed = copy.copy(self)
        changed.generation = {**self.generation, **generation}
        return changed

    def stream(self) -> Iterator[str]:
        """Yield the summary of the text so far, word by word; see `stream_text`."""
        return self.stream_after(result_of(self.read_to_end())[0])

    def stream_after(self, output: BaseModelOutput) -> Iterator[str]:
        """Yield the summary of a decoder context of `read_to_end`, word by word."""
        return stream_text(self.model, self.tokenizer, output, **self.generation)

    def end_section(self) -> Summary:
        """End a section, as in training with `--task sections`. Return the section's summary.

        Raises:
            ValueError: The section has no text.
        """
        return result_of(self.end_section_in_steps())

    def end_section_in_steps(self) -> Steps[Summary]:
        """End a section, and pause after each encoder call."""
        output = None
        for output in self.reader.end_section():  # noqa: B007 - the last output counts
            yield
        if output is None:
            raise ValueError("the section has no tokens")
        text = summary_after(output, self.model, self.tokenizer, **self.generation)
        return Summary(text, self.reader.bookmark.n_segments, self.reader.bookmark.n_tokens)

    def read_to_end(self) -> Steps[tuple[BaseModelOutput, int, int]]:
        """Return the decoder's context after the text so far, and the numbers of its tokens and segments.

        The steps pause after each encoder call.

        Raises:
            ValueError: The text, or the section since the last end of a section, has no tokens.
        """
        reader, mark = self.reader, self.reader.bookmark
        before = reader.n_tokens, reader.n_segments, reader.n_counted
        # all tokens after the bookmark count
        reader.n_counted = 0
        try:
            for output in reader.finish():  # noqa: B007 - the last output counts
                yield
            counts = reader.n_tokens - before[0], reader.n_segments - before[1]
        finally:
            # the last segment is read again once more text has arrived
            reader.n_tokens, reader.n_segments, reader.n_counted = before
        return output, mark.n_tokens + counts[0], mark.n_segments + counts[1]

    def save(self, path: str | Path) -> None:
        """Write the state after the text so far; raise ValueError if the file cannot be written."""
        self.reader.save(Path(path))

    def load(self, path: str | Path) -> None:
        """Continue from a saved state; raise ValueError if the file is no state of this model."""
        self.reader.load(Path(path))


def result_of(steps: Steps[Result]) -> Result:
    """Run all steps without a pause, and return their result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
