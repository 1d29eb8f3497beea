"""Session with a text that arrives in pieces, and can be summarized at any time."""

import copy
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from recurrent_bart.data.text_encoder import decode_text
from recurrent_bart.inference.citations import Citation, cite
from recurrent_bart.inference.stream_reader import SEGMENTS_PER_CALL, TextReader
from recurrent_bart.inference.text_stream import stream_text
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration

Result = TypeVar("Result")
# work that pauses between its steps, so that its caller can do other work or end it, and returns a result
Steps = Generator[None, None, Result]
# decoder context after a text, and the numbers of the text's tokens and segments
ReadText = tuple[BaseModelOutput, int, int]


@dataclass(frozen=True)
class Summary:
    """Summary of a text, and the part of the text that it was made from.

    Attributes:
        n_segments: Segments that the encoder read.
        n_tokens: Tokens that the encoder read, without special tokens and without tokens read again.
        n_cut_tokens: Tokens of the text's end that `max_n_segments` left unread.
        citations: Passages that each sentence was read from; None: they were not asked for.
    """

    text: str
    n_segments: int
    n_tokens: int
    n_cut_tokens: int = 0
    citations: list[Citation] | None = None

    def __str__(self) -> str:
        return self.text

    def record(self) -> dict[str, Any]:
        """Return the summary for JSON: the text as `summary`, then the other fields."""
        content = asdict(self)
        if self.citations is None:
            del content["citations"]
        return {"summary": content.pop("text"), **content}


class ReadingSession:
    """Session with one text. It gives the same summaries as the whole text at once, wherever the text is cut.

    Args:
        model: Model in evaluation mode.
        segments_per_call: Largest number of segments per encoder call.
        query: Question that stands before each segment; empty: none. A saved state brings its own.
        citations: True: summaries have citations.
        generation: Arguments of `generate`.
    """

    def __init__(
        self,
        model: RecurrentBartForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        segments_per_call: int | None = None,
        query: str = "",
        citations: bool = False,
        **generation: Any,
    ):
        self.model, self.tokenizer, self.generation, self.citations = model, tokenizer, generation, citations
        self.reader = TextReader(model, tokenizer, segments_per_call or SEGMENTS_PER_CALL, query)

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
        """Add text, and pause after each encoder call and each piece of characters that is tokenized.

        A session whose steps are not all done has a part of the text.
        """
        # a section begins without the blank lines after the section before it
        if self.reader.is_between_sections and self.reader.bookmark.state is not None:
            self.reader.skip(len(text) - len(text.lstrip()))
            text = text.lstrip()
        for _ in self.reader.feed_in_steps(text):
            yield

    def summary(self) -> Summary:
        """Return the summary of the text so far. Later text continues as if this summary had not been asked for.

        Raises:
            ValueError: The text has no tokens.
        """
        return result_of(self.summary_in_steps())

    def summary_in_steps(self) -> Steps[Summary]:
        """Return the summary of the text so far, and pause after each encoder call."""
        return self._write(*(yield from self.read_to_end()))

    def with_generation(self, generation: Mapping[str, Any], citations: bool | None = None) -> Self:
        """Return the session with other arguments of `generate`, and other citations. Both have the same text."""
        changed = copy.copy(self)
        changed.generation = {**self.generation, **generation}
        changed.citations = self.citations if citations is None else citations
        return changed

    def stream(self) -> Generator[str, None, Summary]:
        """Yield the summary of the text so far, word by word; see `stream_text`. The generator returns the summary."""
        return (yield from self.stream_after(*result_of(self.read_to_end())))

    def stream_after(self, context: BaseModelOutput, n_tokens: int, n_segments: int) -> Generator[str, None, Summary]:
        """Yield the summary of a result of `read_to_end` or `read_section`, as `stream` does."""
        ids = yield from stream_text(self.model, self.tokenizer, context, **self.generation)
        return self._summary(ids, context, n_tokens, n_segments)

    def end_section(self) -> Summary:
        """End a section, as in training with `--task sections`. Return the section's summary.

        Raises:
            ValueError: The section has no text.
        """
        return result_of(self.end_section_in_steps())

    def end_section_in_steps(self) -> Steps[Summary]:
        """End a section, and pause after each encoder call."""
        return self._write(*(yield from self.read_section()))

    def stream_section(self) -> Generator[str, None, Summary]:
        """End a section as `end_section` does, and yield its summary as `stream` does."""
        return (yield from self.stream_after(*result_of(self.read_section())))

    def read_section(self) -> Steps[ReadText]:
        """End a section, and return the decoder's context after it, and the numbers of the text's tokens and segments.

        The steps pause after each encoder call.

        Raises:
            ValueError: The section has no text.
        """
        output = None
        for output in self.reader.end_section():  # noqa: B007 - the last output counts
            yield
        if output is None:
            raise ValueError("the section has no tokens")
        return output, self.reader.bookmark.n_tokens, self.reader.bookmark.n_segments

    def read_to_end(self) -> Steps[ReadText]:
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

    def _write(self, context: BaseModelOutput, n_tokens: int, n_segments: int) -> Summary:
        ids = self.model.generate(encoder_outputs=context, **self.generation)[0]
        return self._summary(ids, context, n_tokens, n_segments)

    def _summary(self, ids_T: Tensor, context: Any, n_tokens: int, n_segments: int) -> Summary:
        citations = None
        if self.citations:
            self.reader.encoder.require_characters()
            citations = cite(self.model, self.tokenizer, context, self.reader.shown, ids_T)
        text = decode_text(self.tokenizer, ids_T).strip()
        return Summary(text, n_segments, n_tokens, citations=citations)

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
