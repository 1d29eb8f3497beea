"""Generation of one batch: a decoder's cache, a search, and the loop over tokens, eagerly or by CUDA graphs.

Shape suffixes: B documents, A attended length, D model width.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from recurrent_bart.execution.cuda_graphs import capture, rng_offset, warm_up
from recurrent_bart.model.decoding.cached_decoder import CachedDecoder
from recurrent_bart.model.decoding.cached_layer import Visible
from recurrent_bart.model.decoding.search import BeamSearch, TokenSearch

logger = logging.get_logger(__name__)

# fewest cached positions that a captured step attends to; each further graph of a session has twice as many
LEAST_KEYS = 64
# captured steps between two checks for the end; a check waits for the GPU
CHECK_EVERY = 16
# finished documents leave the batch once at most this share of it is unfinished; the caches of the rest are copied
LARGEST_REST = 0.75


class DecodeSession:
    """Buffers for one batch size and context length, and the loop that writes texts with them.

    A captured session holds one CUDA graph for each power of two of visible positions, or one in all if kernels run. It
    holds the cache and the search's tensors at fixed addresses, and any number of batches can use it one after the
    other.
    """

    def __init__(self, decoder: CachedDecoder, search: TokenSearch | BeamSearch, graphs: "StepGraphs | None" = None):
        self.decoder, self.search, self.graphs = decoder, search, graphs
        if isinstance(search, TokenSearch):
            search.uses_kernels = decoder.is_fused

    def load(self, context_BAD: Tensor, mask_BA: Tensor | None, prompt: Tensor) -> None:
        """Start with other contexts; read all tokens of the prompt but the last."""
        search = self.search
        self.decoder.load(context_BAD, mask_BA)
        search.begin(prompt)
        search.position.zero_()
        for n_ids in range(1, prompt.shape[1]):
            self.decoder.read(search.tokens(), self._visible(n_ids, is_full=True))
            search.position += 1

    def run(self, n_table: int, streamer: Any, refuse: Callable[[], None], is_stopped: Callable[[], bool]) -> None:
        """Write the texts.

        Args:
            n_table: Number of positions in the decoder's position table.
            streamer: Receives the tokens of each step; None: nobody.
            refuse: Raises the error for a text that needs more positions.
            is_stopped: Returns True once the texts are to end where they are.
        """
        settings = self.search.settings
        is_checked = self.graphs is None or streamer is not None or settings.is_sampled
        check_every = 1 if is_checked or not self.search.is_capturable else CHECK_EVERY
        # graphs have fixed sizes, a drawn token depends on the rows, and so may Hugging Face's own processors
        may_drop = not (self.graphs or streamer or settings.is_sampled) and self.search.is_capturable
        n_ids = settings.n_prompt
        while n_ids < settings.max_length:
            if n_ids > n_table:
                refuse()
            n_next = min(n_ids + check_every, settings.max_length, n_table + 1)
            for length in range(n_ids, n_next):
                self._step(length)
            n_ids = n_next
            if streamer is not None:
                streamer.put(self.search.tokens().cpu())
            if self.search.is_done() or is_stopped():
                break
            if may_drop:
                self._drop_finished()

    def _drop_finished(self) -> None:
        """Drop finished documents from the batch once they are many."""
        goes_on = self.search.goes_on()
        if 0 < int(goes_on.sum()) <= LARGEST_REST * len(goes_on):
            rows = goes_on.nonzero().squeeze(1)
            self.decoder.keep(rows)
            self.search.keep(rows)

    def n_bytes(self) -> int:
        """Return the size of all tensors, apart from memory inside CUDA graphs."""
        return self.decoder.n_bytes() + sum(part.nbytes for part in self.search.state())

    def _step(self, n_ids: int) -> None:
        """Append one token to texts of `n_ids` tokens."""
        if self.graphs is not None:
            self.graphs.step(self, n_ids)
        else:
            self.search.choose(self.decoder.step(self.search.tokens(), self._visible(n_ids, is_full=True)))

    def _visible(self, n_keys: int, is_full: bool) -> Visible:
        search = self.search
        mask = None if self.decoder.is_fused else search.mask(n_keys, is_full, self.decoder.layers[0].own_kv)
        return Visible(search.position, n_keys, mask, search.ancestor)

    def logits(self, n_keys: int) -> Tensor:
        """Return the next tokens' scores, with a mask over `n_keys` cached positions."""
        return self.decoder.step(self.search.tokens(), self._visible(n_keys, is_full=False))


class StepGraphs:
    """CUDA graphs of a session's step, by the number of visible positions.

    A graph holds the choice of the token too, unless the choice waits for the device. After a capture that failed, all
    steps of the model without a graph run eagerly.
    """

    def __init__(self, generator: torch.Generator, place: "CapturePlace"):
        self.generator, self.place = generator, place
        self.graphs: dict[int, tuple[Tensor | None, Any]] = {}

    def step(self, session: DecodeSession, n_ids: int) -> None:
        """Append one token to texts of `n_ids` tokens; capture the graph first if it is new."""
        # kernels read the number of positions on the device, so one graph is enough
        n_keys = session.decoder.shape.n_positions if session.decoder.is_fused else LEAST_KEYS
        while n_keys < n_ids:
            n_keys *= 2
        n_keys = min(n_keys, session.decoder.shape.n_positions)
        if n_keys not in self.graphs and self.place.may_capture:
            self._add(session, n_keys)
        if n_keys not in self.graphs:
            _whole_step(session, n_keys)
            return
        logits, graph = self.graphs[n_keys]
        graph.replay()
        if logits is not None:
            # a processor may keep the scores, and the next replay writes into `logits`
            session.search.choose(logits if session.search.process.is_capturable else logits.clone())

    def _add(self, session: DecodeSession, n_keys: int) -> None:
        """Capture one step. The warm-up runs it, so all changed values are restored; the cache is written again."""
        search = session.search
        work = functools.partial(_whole_step if search.is_capturable else DecodeSession.logits, session, n_keys)
        before = [part.clone() for part in search.state()]

        def restore() -> None:
            for part, value in zip(search.state(), before, strict=True):
                part.copy_(value)

        with rng_offset(self.generator, self.generator.get_offset()):
            try:
                warm_up([work], self.place.stream)
            finally:
                restore()
            try:
                self.graphs[n_keys] = capture(work, self.place.stream, self.place.pool)
            except RuntimeError as error:
                self.place.may_capture = False
                logger.warning_once(
                    f"generate: steps run without CUDA graphs, which is slower; a capture failed: {error}"
                )
        restore()


class CapturePlace:
    """Stream and memory pool in which a model's steps are captured.

    Attributes:
        may_capture: False after a capture that failed, because PyTorch may not give its memory back.
    """

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.may_capture = True


def _whole_step(session: DecodeSession, n_keys: int) -> None:
    session.search.choose(session.logits(n_keys))
