"""Summaries of texts of any length, one by one, in batches, or of a text that arrives in pieces."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, overload

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

from recurrent_bart.data.batches import Collator, SegmentSizes, check_query
from recurrent_bart.data.rows import refuse
from recurrent_bart.data.text_encoder import TextEncoder, Token, decode_text
from recurrent_bart.data.token_batches import group_by_segments
from recurrent_bart.data.tokenizer import special_tokens_around
from recurrent_bart.inference.bookmark import Bookmark
from recurrent_bart.inference.citations import Citation, cite
from recurrent_bart.inference.one_ahead import one_ahead
from recurrent_bart.inference.reading_session import ReadingSession, Summary
from recurrent_bart.inference.shown_tokens import ShownToken, show_segments
from recurrent_bart.inference.stream_reader import TextReader, load_model, run_flags, summary_after
from recurrent_bart.model.generation_settings import MAX_TARGET_LENGTH, change_settings, text_length
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.recurrence.segmentation import split_into_segments

TOKENS_PER_BATCH = 16_384
Item = TypeVar("Item")


@dataclass(frozen=True)
class EncodedTexts:
    """Texts and their questions as tokens.

    Attributes:
        queries: Question about each text, empty for none.
        questions: Ids of each question and its separator.
        tokens: Tokens of each text: with their characters if summaries have citations, or else their ids.
    """

    queries: Sequence[str]
    questions: list[list[int]]
    tokens: Sequence[list[int] | list[Token]]

    def __len__(self) -> int:
        return len(self.tokens)


class Summarizer:
    """Summarizer of texts in batches of at most `tokens_per_batch` tokens, padding included.

    A text with more tokens than a batch is encoded alone, some segments at a time. Raise ValueError if a segment has
    more tokens than a batch, or the question leaves no room for text.

    Args:
        model: Model in evaluation mode.
        max_n_segments: Number of segments after which a text is cut; -1 reads all.
        query: Question about each text, for a model of `--query_column`; empty: none. It stands before each segment.
        citations: True: summaries have citations. Raise ValueError if the tokenizer does not tell its characters.
        generation: Arguments of `generate`.
    """

    def __init__(
        self,
        model: RecurrentBartForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        max_n_segments: int = -1,
        query: str = "",
        citations: bool = False,
        **generation: Any,
    ):
        self.model, self.tokenizer, self.generation = model, tokenizer, generation
        self.query, self.citations = query, citations
        self.encoder = TextEncoder(tokenizer)
        if citations:
            self.encoder.require_characters()
        config, special = model.config, special_tokens_around(tokenizer)
        # the configuration fills in both sizes
        assert config.segment_size is not None
        assert config.input_size is not None
        if tokens_per_batch < config.input_size:
            raise ValueError(
                f"--tokens_per_batch {tokens_per_batch}: must be at least {config.input_size}, the tokens of a segment"
            )
        if max_n_segments < 1 and max_n_segments != -1:
            raise ValueError(f"max_n_segments {max_n_segments}: must be at least 1, or -1 for all")
        self.most_segments = tokens_per_batch // config.input_size
        sizes = SegmentSizes(config.segment_size, config.input_size, max_n_segments=-1)
        self.collator = Collator("document", sizes, *special, config.pad_token_id, max_target_length=0)
        self.segment_size, self.room = config.segment_size, config.segment_size - sum(map(len, special))
        (question,) = self.encoder.queries([query])
        check_query(len(question), self.room, self.segment_size, "--query")
        self.max_n_segments = max_n_segments

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        max_n_segments: int = -1,
        trust_remote_code: bool = False,
        query: str = "",
        citations: bool = False,
        **settings: Any,
    ) -> Self:
        """Load a model and its tokenizer. `settings` change the model's generation settings, for example `num_beams`.

        Without `device` the first GPU is used, or the CPU. Without `dtype` a GPU that can computes in bfloat16.

        Raises:
            ValueError: The folder has no usable model, or a setting is impossible.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None:
            has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
            dtype = torch.bfloat16 if has_bf16 else torch.float32
        model, tokenizer = load_model(str(folder), device, dtype, trust_remote_code)
        longest = text_length(model.config, model.generation_config, settings, target_length(str(folder)))
        change_settings(model.generation_config, settings, longest)
        return cls(model, tokenizer, tokens_per_batch, max_n_segments, query, citations, max_new_tokens=longest)

    @overload
    def __call__(self, texts: str, queries: str | None = None) -> Summary: ...  # type: ignore[overload-overlap]  # a str is a Sequence[str] too

    @overload
    def __call__(self, texts: Sequence[str], queries: Sequence[str] | None = None) -> list[Summary]: ...

    def __call__(
        self, texts: str | Sequence[str], queries: str | Sequence[str] | None = None
    ) -> Summary | list[Summary]:
        """Summarise one text or several texts, each with its question if `queries` is given; see `summarize`."""
        asked = [] if queries is None else [[queries] if isinstance(queries, str) else queries]
        return self.summarize([texts], *asked)[0] if isinstance(texts, str) else self.summarize(texts, *asked)

    def encode(self, texts: Sequence[str], queries: Sequence[str] | None = None) -> EncodedTexts:
        """Return the tokens of texts and questions, for `summarize`.

        Raises:
            ValueError: A question leaves no room for text, or the numbers of texts and questions differ.
        """
        queries = [self.query] * len(texts) if queries is None else queries
        return EncodedTexts(queries, self._questions(texts, queries), self._tokens(texts))

    def encode_ahead(
        self, items: Iterable[Item], arguments: Callable[[Item], Sequence[Sequence[str]]]
    ) -> Iterator[tuple[Item, EncodedTexts | None]]:
        """Yield each item with its encoded texts; with None if `encode` refuses them.

        A thread encodes the texts of the next item while the caller works with the current item. Slow tokenizers serve
        one thread only, so they encode without a thread.

        Args:
            items: Groups of texts.
            arguments: Function that returns the arguments of `encode` for an item.
        """

        def encode(item: Item) -> EncodedTexts | None:
            try:
                return self.encode(*arguments(item))
            except ValueError:
                return None

        if isinstance(self.tokenizer, PreTrainedTokenizerFast):
            yield from one_ahead(encode, items)
        else:
            yield from ((item, encode(item)) for item in items)

    def summarize(self, texts: Sequence[str] | EncodedTexts, queries: Sequence[str] | None = None) -> list[Summary]:
        """Return one summary per text; batching does not change it.

        Args:
            texts: Texts of any length, or what `encode` returned.
            queries: Question about each text, empty for none; None: the summarizer's own about all texts. Ignored for
                encoded texts, which have their questions.

        Raises:
            ValueError: A text has no tokens, a question leaves no room for text, or the numbers of texts and questions
                differ.
        """
        found: dict[int, Summary] = {}
        for part in self.summarize_in_steps(texts, queries):
            found |= part
        return [found[index] for index in range(len(texts))]

    def summarize_in_steps(
        self, texts: Sequence[str] | EncodedTexts, queries: Sequence[str] | None = None
    ) -> Iterator[dict[int, Summary]]:
        """Yield the summaries of one batch after another, by the index of the text, short texts first.

        While a text that is longer than a batch is read, an empty dictionary is yielded after each encoder call.
        Arguments and errors are as in `summarize`.
        """
        encoded = texts if isinstance(texts, EncodedTexts) else self.encode(texts, queries)
        queries, asked, whole = encoded.queries, encoded.questions, encoded.tokens
        if not all(whole):
            raise ValueError(f"document {whole.index([]) + 1} of {len(whole)} has no tokens")
        rooms = [self.room - len(question) for question in asked]
        most = [None if self.max_n_segments == -1 else self.max_n_segments * room for room in rooms]
        read: list[list[int] | list[Token]] = [document[:limit] for document, limit in zip(whole, most, strict=True)]
        n_segments = [-(-len(document) // room) for document, room in zip(read, rooms, strict=True)]
        for group in reversed(group_by_segments(n_segments, self.most_segments)):
            found: Iterable[tuple[str, list[Citation] | None]]
            if n_segments[group[0]] > self.most_segments:
                reader = TextReader(self.model, self.tokenizer, query=queries[group[0]])
                reader.bookmark = Bookmark(tokens=_as_tokens(read[group[0]]))
                for context in reader.finish():  # noqa: B007 - the last context counts
                    yield {}
                found = [self._write(context, reader.shown)]
            else:
                found = self._summarize_batch([(asked[index], read[index]) for index in group])
            yield {
                index: Summary(text, n_segments[index], len(read[index]), len(whole[index]) - len(read[index]), cited)
                for index, (text, cited) in zip(group, found, strict=True)
            }

    def _questions(self, texts: Sequence[str], queries: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text's question and separator."""
        if len(queries) != len(texts):
            raise ValueError(f"{len(queries)} queries for {len(texts)} texts: give one query for each text")
        different = list(dict.fromkeys(queries))
        known = dict(zip(different, self.encoder.queries(different), strict=True))
        for query, ids in known.items():
            name = f"--query of text {queries.index(query) + 1}"
            check_query(len(ids), self.room, self.collator.sizes.segment_size, name)
        return [known[query] for query in queries]

    def predict(
        self,
        source: str | Path,
        output: str | Path,
        text_column: str = "document",
        id_column: str = "id",
        on_bad: Callable[[ValueError], None] = refuse,
        query_column: str | None = None,
    ) -> int:
        """Summarise the rows of a JSON Lines, JSON, CSV, TSV or Parquet file; see `predict_file`."""
        # import late: its readers import `datasets`
        from recurrent_bart.inference.prediction_file import predict_file

        columns = text_column, id_column
        return predict_file(
            self.summarize, Path(source), Path(output), columns, on_bad, query_column, self.encode_ahead
        )

    def open(self, segments_per_call: int | None = None, query: str | None = None) -> ReadingSession:
        """Return a session, to which a text is added in pieces; see `ReadingSession`.

        `query` replaces the summarizer's question.
        """
        query = self.query if query is None else query
        return ReadingSession(self.model, self.tokenizer, segments_per_call, query, self.citations, **self.generation)

    def stream(self, text: str, query: str | None = None) -> Generator[str, None, Summary]:
        """Read a text, and yield its summary word by word; see `stream_text`. The generator returns the summary."""
        session = self.open(query=query)
        session.add(text)
        return (yield from session.stream())

    def summary_after(self, output: BaseModelOutput) -> str:
        """Return the summary of a decoder context that a reader yields."""
        return summary_after(output, self.model, self.tokenizer, **self.generation)

    def _tokens(self, texts: Sequence[str]) -> Sequence[list[int] | list[Token]]:
        """Return the tokens of each text with their characters if summaries have citations, or else their ids."""
        # documents of training and evaluation have no white space at their end
        texts = [text.rstrip() for text in texts]
        if self.citations:
            self.encoder.require_characters()
            return [self.encoder.tokens(text) for text in texts]
        return self.encoder(texts)

    @torch.no_grad()
    def _summarize_batch(
        self, documents: list[tuple[list[int], list[int] | list[Token]]]
    ) -> Iterator[tuple[str, list[Citation] | None]]:
        """Yield the summary of each document, which is given with the ids of its question."""
        rows = [
            {"index": index, "query": query, "sections": [_as_ids(document)], "summaries": [[]]}
            for index, (query, document) in enumerate(documents)
        ]
        batch = self.collator(rows)
        context = self.model.model.encode(batch.input_ids.to(self.model.device), batch.attention_mask, is_decoded=True)
        generated = self.model.generate(encoder_outputs=context, **self.generation)
        for index, ((query, document), ids) in enumerate(zip(documents, generated, strict=True)):
            shown = []
            if self.citations:
                shown = show_segments([], self._segments(_as_tokens(document), query), self.model.config)
            yield self._written(ids, context.rows(torch.tensor([index])) if self.citations else context, shown)

    def _segments(self, document: list[Token], query: Sequence[int] = ()) -> list[list[Token]]:
        """Cut a document as the collator cuts it; `query` has the ids of its question."""
        leading, trailing = [*map(Token, (*self.collator.leading, *query))], [*map(Token, self.collator.trailing)]
        sizes = self.collator.sizes.segment_size, self.collator.sizes.input_size
        return split_into_segments([*leading, *document, *trailing], *sizes, len(leading), len(trailing))

    def _write(self, context: BaseModelOutput, shown: Sequence[ShownToken]) -> tuple[str, list[Citation] | None]:
        ids_T = self.model.generate(encoder_outputs=context, **self.generation)[0]
        return self._written(ids_T, context, shown)

    def _written(self, ids_T: Tensor, context: Any, shown: Sequence[ShownToken]) -> tuple[str, list[Citation] | None]:
        citations = cite(self.model, self.tokenizer, context, shown, ids_T) if self.citations else None
        return decode_text(self.tokenizer, ids_T).strip(), citations


def _as_tokens(document: Sequence[int | Token]) -> list[Token]:
    return [Token(token) if isinstance(token, int) else token for token in document]


def _as_ids(document: Sequence[int | Token]) -> list[int]:
    return [token if isinstance(token, int) else token.id for token in document]


def target_length(model_folder: str) -> int:
    """Return the maximum target length, in tokens, of the run that saved the model; the default without a run."""
    return run_flags(model_folder).get("data", {}).get("max_target_length", MAX_TARGET_LENGTH)
