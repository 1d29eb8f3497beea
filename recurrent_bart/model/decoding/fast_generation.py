"""Loops over tokens that replace Hugging Face's inside `generate`, with the same ids.

Hugging Face's `generate` reads arguments, checks them, and prepares processors and stopping criteria. Then it calls a
loop, and this module has the faster one.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.utils import logging

from recurrent_bart.execution.graph_guards import device_guard
from recurrent_bart.model.decoder_attention import GatedCrossAttention
from recurrent_bart.model.decoding.cached_decoder import CachedDecoder
from recurrent_bart.model.decoding.cached_layer import CacheShape
from recurrent_bart.model.decoding.coverage import call_needs_hugging_face, model_needs_hugging_face
from recurrent_bart.model.decoding.fused_layer import has_failed
from recurrent_bart.model.decoding.processors import DeviceProcessors
from recurrent_bart.model.decoding.search import BeamSearch, SearchSettings, TokenSearch, build_search
from recurrent_bart.model.decoding.session import DecodeSession
from recurrent_bart.model.decoding.session_store import (
    captured_session,
    drop_sessions,
    rounded_context,
    rounded_rows,
    session_store,
)
from recurrent_bart.model.decoding.stopping import is_stopped

logger = logging.get_logger(__name__)


def generate_fast(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    **kwargs: Any,
) -> Tensor | None:
    """Return the ids that Hugging Face's loop would return, or None if that loop must run.

    The arguments are what Hugging Face's `generate` gives its loops. `generation_config.fast=False` returns None.
    """
    if getattr(generation_config, "fast", None) is False:
        return None
    asked = call_needs_hugging_face(generation_config, stopping_criteria, kwargs)
    if asked is not None:
        logger.info_once(f"generate: {asked} needs Hugging Face's own loop, which is slower")
        return None
    hidden = kwargs["encoder_outputs"].last_hidden_state
    reason = model_needs_hugging_face(model, hidden.device)
    if reason is not None:
        logger.warning_once(f"generate: Hugging Face's own loop runs, which is slower, because {reason}")
        return None
    batch = Batch.of(model, kwargs["encoder_outputs"], input_ids, generation_config)
    streamer = kwargs.get("streamer")
    with _explained_memory_error(batch), device_guard(hidden.device):
        return _write(model, batch, logits_processor, streamer, functools.partial(is_stopped, stopping_criteria))


@dataclass(frozen=True)
class Batch:
    """Contexts `(B, A, D)`, one per document, their padding mask, and the first ids of all texts.

    `n_results` is the number of texts that are returned for each document.
    """

    context: Tensor
    mask: Tensor | None
    prompt: Tensor
    settings: SearchSettings
    n_texts: int
    n_results: int
    n_memory: int
    n_table: int

    @classmethod
    def of(cls, model: Any, encoded: Any, input_ids: Tensor, config: GenerationConfig) -> "Batch":
        """Undo the repetition of each context for its texts."""
        n_texts = max(config.num_beams or 1, config.num_return_sequences or 1)
        is_gated = any(isinstance(layer.encoder_attn, GatedCrossAttention) for layer in model.model.decoder.layers)
        mask = encoded.context_mask
        return cls(
            context=encoded.last_hidden_state[::n_texts],
            mask=None if mask is None or encoded.has_padding is False else mask[::n_texts],
            prompt=input_ids.to(encoded.last_hidden_state.device),
            settings=SearchSettings.of(config, input_ids.shape[1]),
            n_texts=n_texts,
            n_results=config.num_return_sequences or 1,
            n_memory=(encoded.n_memory or 0) if is_gated else 0,
            n_table=model.config.max_position_embeddings,
        )

    @property
    def can_capture(self) -> bool:
        """True if the batch is on a GPU that no other code captures at the moment."""
        return self.context.is_cuda and not torch.cuda.is_current_stream_capturing()

    def shape(self) -> CacheShape:
        """Return the sizes of the buffers."""
        n_documents, n_context, _ = self.context.shape
        # the last token of a text is not read
        n_positions = min(self.settings.max_length, self.n_table + 1)
        n_sharing = self.settings.num_beams
        is_padded = self.mask is not None
        return CacheShape(n_documents, self.n_texts, n_sharing, n_positions, n_context, is_padded, self.n_memory)

    def captured_shape(self, may_round_rows: bool) -> CacheShape:
        """Return sizes that many batches have; attention is faster on lengths that are a multiple of 8."""
        shape = self.shape()
        n_tokens = shape.n_context - shape.n_memory
        n_context = shape.n_memory + (rounded_context(n_tokens) if shape.is_padded else n_tokens)
        n_positions = -(-shape.n_positions // 64) * 64
        # more rows would draw other random numbers
        may_round_rows = may_round_rows and not self.settings.is_sampled
        n_documents = rounded_rows(shape.n_documents) if may_round_rows else shape.n_documents
        return replace(shape, n_documents=n_documents, n_context=n_context, n_positions=n_positions)

    def repeated(self, n_documents: int) -> "Batch":
        """Repeat the last document, which ends when it ends and so changes nothing."""
        n_missing = n_documents - len(self.context)
        if not n_missing:
            return self
        n_texts = self.n_texts
        parts = (self.context, 1), (self.mask, 1), (self.prompt, n_texts)
        context, mask, prompt = (
            None if part is None else torch.cat([part, part[-n_rows:].repeat(n_missing, *[1] * (part.dim() - 1))])
            for part, n_rows in parts
        )
        assert context is not None
        assert prompt is not None
        return replace(self, context=context, mask=mask, prompt=prompt)


def _write(
    model: Any, batch: Batch, processors: LogitsProcessorList, streamer: Any, is_stopped: Callable[[], bool]
) -> Tensor:
    process = DeviceProcessors(processors, model.config.vocab_size, batch.context.device)
    # keys have the dtype of the projection, which an adapter or a quantized layer may change
    like = model.model.decoder.layers[0].encoder_attn.k_proj(batch.context[:1, :1])

    def run() -> Tensor:
        return _run_captured_or_eagerly(model, batch, process, like, streamer, is_stopped)

    try:
        return run()
    except Exception as error:
        # kernels are compiled by the first step, before a streamer has tokens
        if not has_failed(model.model.decoder, error):
            raise
    if batch.can_capture:
        drop_sessions(model)
    return run()


def _run_captured_or_eagerly(
    model: Any, batch: Batch, process: DeviceProcessors, like: Tensor, streamer: Any, is_stopped: Callable[[], bool]
) -> Tensor:
    def make_search(shape: CacheShape) -> TokenSearch | BeamSearch:
        return build_search(batch.settings, process, shape.n_documents * shape.n_texts, shape.n_positions)

    if batch.can_capture:
        # a streamer, and processors that run as Hugging Face's own code, must not see additional rows
        shape = batch.captured_shape(may_round_rows=streamer is None and process.is_capturable)
        store = session_store(model)
        with store.reserved() as is_free:
            if is_free:

                def run_captured() -> Tensor:
                    session = captured_session(model, store, shape, like, functools.partial(make_search, shape))
                    return _run(model, session, batch, streamer, is_stopped)

                try:
                    return run_captured()
                except torch.OutOfMemoryError:
                    # a streamer may have tokens already
                    if streamer is not None:
                        raise
                store.clear()
                return run_captured()
    shape = batch.shape()
    session = DecodeSession(CachedDecoder(model, shape, like), make_search(shape))
    return _run(model, session, batch, streamer, is_stopped)


def _run(model: Any, session: DecodeSession, batch: Batch, streamer: Any, is_stopped: Callable[[], bool]) -> Tensor:
    whole = batch.repeated(session.decoder.shape.n_documents)
    refuse = functools.partial(model.model.check_positions, batch.n_table + 1)
    if whole.prompt.shape[1] > batch.n_table:
        refuse()
    session.load(whole.context, whole.mask, whole.prompt)
    session.run(batch.n_table, streamer, refuse, is_stopped)
    if streamer is not None:
        streamer.end()
    n_documents, search = len(batch.context), session.search
    if isinstance(search, BeamSearch):
        return search.texts(n_documents, batch.n_results)
    return search.texts(n_documents * batch.n_texts)


@contextlib.contextmanager
def _explained_memory_error(batch: Batch) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        n_documents, n_context, _ = batch.context.shape
        raise torch.OutOfMemoryError(
            f"{error}\ngenerate: the caches of {n_documents} documents with {n_context} context positions, "
            f"{batch.n_texts} texts per document and at most {batch.settings.max_length} tokens do not fit on the GPU; "
            "lower the batch size, num_beams, num_return_sequences or max_new_tokens, or generate with may_pack=True"
        ) from error
