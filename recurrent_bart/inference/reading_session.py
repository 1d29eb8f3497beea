"""Session with a text that arrives in pieces, and can be summarized at any time."""

from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from recurrent_bart.data.text_encoder import decode_text
from recurrent_bart.inference.citations import Citation, cite
from recurrent_bart.inference.stream_reader import SEGMENTS_PER_CALL, TextReader
from recurrent_bart.inference.text_stream import stream_text
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration


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

    def add(self, text: str, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Add text. `on_progress` is called with the numbers of tokens and segments read so far."""
        # a section begins without the blank lines after the section before it
        if self.reader.is_between_sections and self.reader.bookmark.state is not None:
            self.reader.skip(len(text) - len(text.lstrip()))
            text = text.lstrip()
        for _ in self.reader.feed(text):
            if on_progress is not None:
                on_progress(self.reader.n_tokens, self.reader.n_segments)

    def summary(self) -> Summary:
        """Return the summary of the text so far. Later text continues as if this summary had not been asked for.

        A session that was loaded counts only what it has read itself. Raise ValueError for a text without tokens.
        """
        return self._write(*self.read_to_end())

    def stream(self) -> Generator[str, None, Summary]:
        """Yield the summary of the text so far, word by word; see `stream_text`. The generator returns the summary."""
        return (yield from self._write_slowly(*self.read_to_end()))

    def end_section(self) -> Summary:
        """End a section, as in training with `--task sections`. Return the section's summary.

        Raises:
            ValueError: The section has no text.
        """
        return self._write(*self._end_section())

    def stream_section(self) -> Generator[str, None, Summary]:
        """End a section as `end_section` does, and yield its summary as `stream` does."""
        return (yield from self._write_slowly(*self._end_section()))

    def _end_section(self) -> tuple[BaseModelOutput, int, int]:
        outputs = list(self.reader.end_section())
        if not outputs:
            raise ValueError("the section has no tokens")
        return outputs[-1], self.reader.n_tokens, self.reader.n_segments

    def _write(self, context: BaseModelOutput, n_tokens: int, n_segments: int) -> Summary:
        ids = self.model.generate(encoder_outputs=context, **self.generation)[0]
        return self._summary(ids, context, n_tokens, n_segments)

    def _write_slowly(self, context: BaseModelOutput, n_tokens: int, n_segments: int) -> Generator[str, None, Summary]:
        ids = yield from stream_text(self.model, self.tokenizer, context, **self.generation)
        return self._summary(ids, context, n_tokens, n_segments)

    def _summary(self, ids_T: Tensor, context: Any, n_tokens: int, n_segments: int) -> Summary:
        citations = None
        if self.citations:
            self.reader.encoder.require_characters()
            citations = cite(self.model, self.tokenizer, context, self.reader.shown, ids_T)
        text = decode_text(self.tokenizer, ids_T).strip()
        return Summary(text, n_segments, n_tokens, citations=citations)

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
