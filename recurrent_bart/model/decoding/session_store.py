"""Captured sessions of a model, kept for the next batch of the same sizes and settings."""

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from recurrent_bart.execution.graph_guards import graph_store
from recurrent_bart.execution.module_settings import backend_settings, own_parameters, settings_of
from recurrent_bart.model.decoding.cached_decoder import CachedDecoder
from recurrent_bart.model.decoding.cached_layer import CacheShape
from recurrent_bart.model.decoding.search import BeamSearch, TokenSearch
from recurrent_bart.model.decoding.session import CapturePlace, DecodeSession, StepGraphs

# captured sessions per model, by last use; a capture costs about as much as three uncaptured steps
MOST_SESSIONS = 8
# part of the GPU's memory for caches, copied weights and texts that a model keeps between calls; memory inside graphs
# comes on top
LARGEST_PART = 1 / 16
# captured batches have these multiples of rows and of padded context positions
ROWS_STEP = 8
CONTEXT_STEP = 64

Search = TokenSearch | BeamSearch


class SessionStore:
    """Sessions by key; only one thread may use them at a time."""

    def __init__(self, device: torch.device) -> None:
        self.sessions: dict[Hashable, DecodeSession] = {}
        self.lock = threading.Lock()
        self.device, self.place = device, CapturePlace()

    @contextlib.contextmanager
    def reserved(self) -> Iterator[bool]:
        """Reserve the sessions; yield False if another thread has reserved them."""
        is_free = self.lock.acquire(blocking=False)
        try:
            yield is_free
        finally:
            if is_free:
                self._drop_oldest()
                self.lock.release()

    def session(
        self, key: Hashable, build: Callable[[StepGraphs], DecodeSession], device: torch.device
    ) -> DecodeSession:
        """Return the session for a key, built if it is missing."""
        if key not in self.sessions:
            generator = torch.cuda.default_generators[device.index or 0]
            # tensors of inference mode could not be used in a later call
            with torch.inference_mode(False), torch.no_grad():
                self.sessions[key] = build(StepGraphs(generator, self.place))
        self.sessions[key] = self.sessions.pop(key)
        return self.sessions[key]

    def clear(self) -> None:
        """Drop all sessions, and free their memory."""
        self.sessions.clear()
        self.place.pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

    def _drop_oldest(self) -> None:
        n_bytes = sum(session.n_bytes() for session in self.sessions.values())
        while self.sessions and (len(self.sessions) > MOST_SESSIONS or n_bytes > most_bytes()):
            n_bytes -= self.sessions.pop(next(iter(self.sessions))).n_bytes()


def session_store(model: Any) -> SessionStore:
    """Return the model's captured sessions; without any if the parameters have moved."""
    graphs = graph_store(model).graphs
    addresses = tuple((part.data_ptr(), part.dtype) for part in _tensors(model))
    device = model.lm_head.weight.device
    before, store = graphs.get(SessionStore) or (None, None)
    if store is None or store.device != device:
        # the stream and the pool belong to a device
        before, store = None, SessionStore(device)
    if before != addresses:
        # the stream stays: PyTorch has few, and would give that of other graphs
        store.clear()
        graphs[SessionStore] = addresses, store
    return store


def drop_sessions(model: nn.Module) -> None:
    """Free the memory of a model's captured sessions. The next call of `generate` captures again."""
    _, store = graph_store(model).graphs.get(SessionStore) or (None, None)
    if store is not None:
        with store.reserved() as is_free:
            if is_free:
                store.clear()


def most_bytes() -> float:
    """Return the size of what all sessions of a model may keep between calls."""
    return LARGEST_PART * torch.cuda.get_device_properties().total_memory


def _tensors(model: Any) -> Iterator[Tensor]:
    yield from own_parameters([*model.model.decoder.modules(), *model.lm_head.modules()])
    yield model.final_logits_bias


def captured_session(
    model: Any, store: SessionStore, shape: CacheShape, like: Tensor, make_search: Callable[[], Search]
) -> DecodeSession:
    """Return the captured session for these sizes and the settings of search, model and PyTorch."""
    # cheap beside the cache: the key needs the constants
    search = make_search()
    settings = *settings_of(model.model.decoder, model.lm_head), backend_settings()
    key = shape, like.dtype, like.device, search.key(), settings
    build = functools.partial(_build, model, shape, like, make_search)
    session = store.session(key, build, like.device)
    if not search.process.is_capturable:
        # no graph holds these processors, which may have a state of their own
        session.search.process = search.process
    return session


def _build(
    model: Any, shape: CacheShape, like: Tensor, make_search: Callable[[], Search], graphs: StepGraphs
) -> DecodeSession:
    return DecodeSession(CachedDecoder(model, shape, like), make_search(), graphs)


def rounded_rows(n_rows: int) -> int:
    """Return the number of rows of a captured batch: at most a quarter more, in multiples of `ROWS_STEP` above it."""
    return n_rows if n_rows <= ROWS_STEP else _rounded(n_rows, ROWS_STEP, 4)


def rounded_context(n_positions: int) -> int:
    """Return the attended length of a captured padded batch: a multiple of `CONTEXT_STEP`, at most an eighth more."""
    return _rounded(n_positions, CONTEXT_STEP, 8)


def _rounded(number: int, least_step: int, n_steps: int) -> int:
    """Round up to one of `n_steps` values between two powers of two, in steps of at least `least_step`."""
    step = max(least_step, 2 ** (number.bit_length() - 1) // n_steps)
    return -(-number // step) * step
