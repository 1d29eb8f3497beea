"""Summaries of texts of any length, one by one, in batches, or of a text that arrives in pieces."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, overload

import torch
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from recurrent_bart.data.batches import Collator, SegmentSizes
from recurrent_bart.data.rows import refuse
from recurrent_bart.data.text_encoder import TextEncoder, decode_text
from recurrent_bart.data.token_batches import group_by_segments
from recurrent_bart.data.tokenizer import special_tokens_around
from recurrent_bart.inference.reading_session import ReadingSession, Summary
from recurrent_bart.inference.stream_reader import Bookmark, TextReader, load_model, run_flags, summary_after
from recurrent_bart.model.generation_settings import MAX_TARGET_LENGTH, change_settings, text_length
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration

TOKENS_PER_BATCH = 16_384


class Summarizer:
    """Summarizer of texts in batches of at most `tokens_per_batch` tokens, padding included.

    A text with more tokens than a batch is encoded alone, some segments at a time. Raise ValueError if a segment has
    more tokens than a batch.

    Args:
        model: Model in evaluation mode.
        max_n_segments: Number of segments after which a text is cut; -1 reads all.
        generation: Arguments of `generate`.
    """

    def __init__(
        self,
        model: RecurrentBartForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        max_n_segments: int = -1,
        **generation: Any,
    ):
        self.model, self.tokenizer, self.generation = model, tokenizer, generation
        self.encoder = TextEncoder(tokenizer)
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
        self.room = config.segment_size - sum(map(len, special))
        self.most_tokens = None if max_n_segments == -1 else max_n_segments * self.room

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        max_n_segments: int = -1,
        trust_remote_code: bool = False,
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
        return cls(model, tokenizer, tokens_per_batch, max_n_segments, max_new_tokens=longest)

    @overload
    def __call__(self, texts: str) -> Summary: ...  # type: ignore[overload-overlap]  # a str is a Sequence[str] too

    @overload
    def __call__(self, texts: Sequence[str]) -> list[Summary]: ...

    def __call__(self, texts: str | Sequence[str]) -> Summary | list[Summary]:
        """Summarise one text or several texts; see `summarize`."""
        return self.summarize([texts])[0] if isinstance(texts, str) else self.summarize(texts)

    def summarize(self, texts: Sequence[str]) -> list[Summary]:
        """Return one summary per text; batching does not change it. Raise ValueError for a text without tokens."""
        found: dict[int, Summary] = {}
        for part in self.summarize_in_steps(texts):
            found |= part
        return [found[index] for index in range(len(texts))]

    def summarize_in_steps(self, texts: Sequence[str]) -> Iterator[dict[int, Summary]]:
        """Yield the summaries of one batch after another, by the index of the text, short texts first.

        While a text that is longer than a batch is read, an empty dictionary is yielded after each encoder call.
        """
        whole = self.encoder(texts)
        if not all(whole):
            raise ValueError(f"document {whole.index([]) + 1} of {len(whole)} has no tokens")
        ids = [document[: self.most_tokens] for document in whole]
        n_segments = [-(-len(document) // self.room) for document in ids]
        for group in reversed(group_by_segments(n_segments, self.most_segments)):
            if n_segments[group[0]] > self.most_segments:
                reader = TextReader(self.model, self.tokenizer)
                reader.bookmark = Bookmark(ids=ids[group[0]])
                for output in reader.finish():  # noqa: B007 - the last output counts
                    yield {}
                found = [self.summary_after(output)]
            else:
                found = self._summarize_batch([ids[index] for index in group])
            yield {
                index: Summary(text, n_segments[index], len(ids[index]), len(whole[index]) - len(ids[index]))
                for index, text in zip(group, found, strict=True)
            }

    def predict(
        self,
        source: str | Path,
        output: str | Path,
        text_column: str = "document",
        id_column: str = "id",
        on_bad: Callable[[ValueError], None] = refuse,
    ) -> int:
        """Summarise the rows of a JSON Lines, JSON, CSV, TSV or Parquet file; see `predict_file`."""
        # import late: its readers import `datasets`
        from recurrent_bart.inference.prediction_file import predict_file

        return predict_file(self.summarize, Path(source), Path(output), (text_column, id_column), on_bad)

    def open(self, segments_per_call: int | None = None) -> ReadingSession:
        """Return a session, to which a text is added in pieces; see `ReadingSession`."""
        return ReadingSession(self.model, self.tokenizer, segments_per_call, **self.generation)

    def stream(self, text: str) -> Iterator[str]:
        """Read a text, and yield its summary word by word; see `stream_text`."""
        session = self.open()
        session.add(text)
        yield from session.stream()

    def summary_after(self, output: BaseModelOutput) -> str:
        """Return the summary of a decoder context that a reader yields."""
        return summary_after(output, self.model, self.tokenizer, **self.generation)

    def _summarize_batch(self, documents: list[list[int]]) -> list[str]:
        rows = [{"index": index, "sections": [ids], "summaries": [[]]} for index, ids in enumerate(documents)]
        batch = self.collator(rows)
        input_ids = batch.input_ids.to(self.model.device)
        generated = self.model.generate(input_ids, attention_mask=batch.attention_mask, **self.generation)
        return [decode_text(self.tokenizer, ids).strip() for ids in generated]


def target_length(model_folder: str) -> int:
    """Return the maximum target length, in tokens, of the run that saved the model; the default without a run."""
    return run_flags(model_folder).get("data", {}).get("max_target_length", MAX_TARGET_LENGTH)
