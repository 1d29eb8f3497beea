"""Session with a text that arrives in pieces, and can be summarized at any time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from recurrent_bart.inference.stream_reader import SEGMENTS_PER_CALL, TextReader, summary_after
from recurrent_bart.inference.text_stream import stream_text
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration


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
        query: Question that stands before each segment; empty: none. A saved state brings its own.
        generation: Arguments of `generate`.
    """

    def __init__(
        self,
        model: RecurrentBartForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        segments_per_call: int | None = None,
        query: str = "",
        **generation: Any,
    ):
        self.model, self.tokenizer, self.generation = model, tokenizer, generation
        self.reader = TextReader(model, tokenizer, segments_per_call or SEGMENTS_PER_CALL, query)

    def add(self, text: str, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Add text. `on_progress` is called with the numbers of tokens and segments read so far."""
        # a section begins without the blank lines after the section before it
        is_later_section = self.reader.is_between_sections and self.reader.bookmark.state is not None
        for _ in self.reader.feed(text.lstrip() if is_later_section else text):
            if on_progress is not None:
                on_progress(self.reader.n_tokens, self.reader.n_segments)

    def summary(self) -> Summary:
        """Return the summary of the text so far. Later text continues as if this summary had not been asked for.

        A session that was loaded counts only what it has read itself. Raise ValueError for a text without tokens.
        """
        output, n_tokens, n_segments = self.read_to_end()
        text = summary_after(output, self.model, self.tokenizer, **self.generation)
        return Summary(text, n_segments, n_tokens)

    def stream(self) -> Iterator[str]:
        """Yield the summary of the text so far, word by word; see `stream_text`."""
        return stream_text(self.model, self.tokenizer, self.read_to_end()[0], **self.generation)

    def end_section(self) -> Summary:
        """End a section, as in training with `--task sections`. Return the section's summary.

        Raises:
            ValueError: The section has no text.
        """
        outputs = list(self.reader.end_section())
        if not outputs:
            raise ValueError("the section has no tokens")
        text = summary_after(outputs[-1], self.model, self.tokenizer, **self.generation)
        return Summary(text, self.reader.n_segments, self.reader.n_tokens)

    def read_to_end(self) -> tuple[BaseModelOutput, int, int]:
        """Return the decoder's context after the text so far, and the numbers of tokens and segments read for it.

        Raises:
            ValueError: The text, or the section since the last end of a section, has no tokens.
        """
        reader = self.reader
        before = reader.n_tokens, reader.n_segments, reader.n_counted
        *_, output = reader.finish()
        counts = reader.n_tokens, reader.n_segments
        # the last segment is read again once more text has arrived
        reader.n_tokens, reader.n_segments, reader.n_counted = before
        return output, *counts

    def save(self, path: str | Path) -> None:
        """Write the state after the text so far; raise ValueError if the file cannot be written."""
        self.reader.save(Path(path))

    def load(self, path: str | Path) -> None:
        """Continue from a saved state; raise ValueError if the file is no state of this model."""
        self.reader.load(Path(path))
