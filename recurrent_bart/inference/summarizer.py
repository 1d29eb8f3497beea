"""Summaries of many documents, in batches of documents of similar length."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from recurrent_bart.data.batches import Collator, SegmentSizes
from recurrent_bart.data.text_encoder import TextEncoder, decode_text
from recurrent_bart.data.token_batches import group_by_segments
from recurrent_bart.data.tokenizer import special_tokens_around
from recurrent_bart.inference.stream_reader import TextReader, summary_after
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration


class Summariser:
    """Summarizer of documents in batches of at most `tokens_per_batch` tokens, padding included.

    A document with more tokens than a batch is encoded alone, some segments at a time. Raise ValueError if a segment
    has more tokens than a batch. `generation` holds arguments of `generate`.
    """

    def __init__(
        self,
        model: RecurrentBartForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_batch: int,
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
        self.most_segments = tokens_per_batch // config.input_size
        sizes = SegmentSizes(config.segment_size, config.input_size, max_n_segments=-1)
        self.collator = Collator("document", sizes, *special, config.pad_token_id, max_target_length=0)
        self.room = config.segment_size - sum(map(len, special))

    def summarise(self, texts: Sequence[str]) -> list[str]:
        """Return one summary per text; batching does not change it. Raise ValueError for a text without tokens."""
        ids = self.encoder(texts)
        if not all(ids):
            raise ValueError(f"document {ids.index([]) + 1} of {len(ids)} has no tokens")
        n_segments = [-(-len(document) // self.room) for document in ids]
        summaries: dict[int, str] = {}
        for group in group_by_segments(n_segments, self.most_segments):
            if n_segments[group[0]] > self.most_segments:
                summaries[group[0]] = self._summarise_long(texts[group[0]])
            else:
                summaries |= zip(group, self._summarise_batch([ids[index] for index in group]), strict=True)
        return [summaries[index] for index in range(len(texts))]

    def _summarise_batch(self, documents: list[list[int]]) -> list[str]:
        rows = [{"index": index, "sections": [ids], "summaries": [[]]} for index, ids in enumerate(documents)]
        batch = self.collator(rows)
        input_ids = batch.input_ids.to(self.model.device)
        generated = self.model.generate(input_ids, attention_mask=batch.attention_mask, **self.generation)
        return [decode_text(self.tokenizer, ids).strip() for ids in generated]

    def _summarise_long(self, text: str) -> str:
        reader = TextReader(self.model, self.tokenizer)
        for _ in reader.feed(text):
            pass
        *_, output = reader.finish()
        return summary_after(output, self.model, self.tokenizer, **self.generation)
