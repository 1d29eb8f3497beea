"""Generated texts word by word."""

import threading
from collections.abc import Generator, Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer
from transformers.modeling_outputs import BaseModelOutput

from recurrent_bart.data.text_encoder import decode_text
from recurrent_bart.data.word_segmenter import join_words, joins_words
from recurrent_bart.model.decoding.stopping import StopWhen
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration


def stream_text(
    model: RecurrentBartForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    output: BaseModelOutput,
    **generation: Any,
) -> Generator[str, None, Tensor]:
    """Generate a text from a decoder context in a thread, and yield its pieces; joined, they are `summary_after`.

    Beam search knows its words only at the end, so it yields one piece. The generator returns the ids `(T,)`. Closing
    it ends the thread.
    """
    closed = threading.Event()
    generation["stopping_criteria"] = [*generation.get("stopping_criteria", ()), StopWhen(closed.is_set)]
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    uses_beams = (generation.get("num_beams") or model.generation_config.num_beams or 1) > 1
    failures: list[Exception] = []
    generated: list[Tensor] = []

    def generate() -> None:
        try:
            ids = model.generate(encoder_outputs=output, streamer=None if uses_beams else streamer, **generation)
            generated.append(ids[0])
            if uses_beams:
                streamer.on_finalized_text(decode_text(tokenizer, ids[0]), stream_end=True)
        except Exception as error:
            failures.append(error)
            # end() would decode what may have failed, and the reader would wait forever
            streamer.text_queue.put(streamer.stop_signal)

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        yield from stripped(joined(streamer) if joins_words(tokenizer) else streamer)
    finally:
        closed.set()
        thread.join()
    if failures:
        raise failures[0]
    return generated[0]


def joined(pieces: Iterator[str]) -> Iterator[str]:
    """Yield the pieces of a text without the spaces between segmented Japanese words."""
    last = waiting = ""
    for piece in pieces:
        waiting += piece
        # the next letter decides whether a space at the end goes
        whole = waiting.rstrip()
        if whole:
            yield join_words(last + whole)[len(last) :]
            last, waiting = whole[-1], waiting[len(whole) :]


def stripped(pieces: Iterator[str]) -> Iterator[str]:
    """Yield the pieces of a text without white space at its beginning and end."""
    waiting, is_begun = "", False
    for piece in pieces:
        text = waiting + piece if is_begun else piece.lstrip()
        kept = text.rstrip()
        waiting = text[len(kept) :]
        is_begun = is_begun or bool(kept)
        if kept:
            yield kept
