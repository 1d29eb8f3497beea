"""Streaming reader: encodes a text of any length in parts, and can continue from a saved state."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import regex
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from recurrent_bart.data.batches import check_query
from recurrent_bart.data.text_encoder import TextEncoder, Token, decode_text
from recurrent_bart.data.tokenizer import load_tokenizer, special_tokens_around
from recurrent_bart.data.tokenizer_identity import tokenizer_identity
from recurrent_bart.data.word_segmenter import joins_words
from recurrent_bart.distributed import is_first
from recurrent_bart.files import replace_and_fsync
from recurrent_bart.inference.saved_state import check_counts, check_tensors
from recurrent_bart.inference.shown_tokens import ShownToken, after_section, as_tensor, from_tensor, show_segments
from recurrent_bart.model.loading import load_pretrained
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.model.saved_models import check_model_place, reading_model
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from recurrent_bart.recurrence.segmentation import pad_segments
from recurrent_bart.run_folder import RunFolder

# increase the number when the contents of a saved bookmark change
FORMAT = "recurrent_bart reading 6"
# configuration fields that the values of a state depend on, besides the weights
STATE_FIELDS = (
    "pre_seq_len",
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "activation_function",
    "scale_embedding",
    "recurrence",
    "prefix_attention",
    "prefix_projection",
    "update_gate",
    "associative_memory",
    "decoder_context",
    "context_segments",
    "segment_size",
    "input_size",
)
# counts of a bookmark that are saved
COUNTS = ("position", "n_tokens", "n_segments")
# characters tokenized in one call
BLOCK = 2**16
# segments read in one call, enough for the wavefront schedule
SEGMENTS_PER_CALL = 32
# characters without white space after which a text is cut inside a word, which may change a token or two
LONGEST_WORD = 2**20
# Cut before white space, so that no word or run of spaces is split; not before "▁", the unigram tokenizers' mark of a
# space.
BEFORE_SPACE = re.compile(r"(?s).*(?<=\S)(?= \s*[^\s▁])")
BEFORE_WHITE_SPACE = re.compile(r"(?s).*(?<=\S)(?=[ \t\n\r]\s*[^\s▁])")
# Ends of sentences without white space behind them, and places before an ideographic space. The ids of a sentence may
# still depend on the next characters, so each place is checked before a text is cut there.
SENTENCE_CUT = regex.compile(
    r"(?<=\p{Sentence_Terminal}[\p{Pe}\p{Pf}]*)(?=[^\s\p{Sentence_Terminal}\p{Pe}\p{Pf}])|(?<=\S)(?=\u3000+\S)"
)
# characters behind a cut that are known before the text is cut there, more than a token has
LOOKAHEAD = 32
# places that are checked, the last ones of the text
N_PLACES = 4
# characters without an end of a sentence after which a text is cut inside a sentence, where its ids are settled
LONGEST_SENTENCE = 2048
# characters in front of a cut inside a sentence that decide the ids after the cut
CONTEXT = 8 * LOOKAHEAD


@dataclass
class Bookmark:
    """Position in a text that is being read.

    Attributes:
        state: State after the segments read so far; None at the beginning.
        overlap: Last tokens that were read; the next segment begins with them.
        tokens: Tokens not read yet, because they may belong to the last segment of the text.
        text: Characters not tokenized yet, because the next part may continue the last word.
        context: Characters in front of `text` whose ids are read already, because the ids of `text` depend on them;
            empty if the text in front ends with a word and white space follows.
        position: Number of characters in front of `text`.
        n_tokens: Number of tokens in front of `tokens`, without special tokens.
        n_segments: Number of segments in front of `tokens`.
        shown: Tokens that the decoder attends to after the segments read so far.
    """

    state: RecurrentState | None = None
    overlap: list[Token] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    context: str = ""
    position: int = 0
    n_tokens: int = 0
    n_segments: int = 0
    shown: list[ShownToken] = field(default_factory=list)

    @property
    def n_characters(self) -> int:
        """Number of characters so far, `text` included."""
        return self.position + len(self.text)


class TextReader:
    """Reader of a text that arrives in parts; segments and results are the same as for the whole text at once.

    The reader keeps only the state and the text of a few segments. The state itself grows with every segment unless
    `decoder_context="last"` or `context_segments` limits its size.

    Args:
        model: Model in evaluation mode.
        segments_per_call: Largest number of segments per encoder call; 1: yield the context after each segment.
        query: Question that stands before each segment; empty: none. Raise ValueError if it leaves no room for text.
    """

    def __init__(
        self,
        model: RecurrentBartForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        segments_per_call: int = SEGMENTS_PER_CALL,
        query: str = "",
    ):
        self.model, self.tokenizer, self.segments_per_call = model, tokenizer, segments_per_call
        self.encoder = TextEncoder(tokenizer)
        segment_size, input_size = model.config.segment_size, model.config.input_size
        # the configuration fills in both sizes
        assert segment_size is not None
        assert input_size is not None
        self.n_overlap = input_size - segment_size
        self._ask(query)
        self.bookmark = Bookmark()
        # counts of this reader; tokens that a bookmark keeps are read again and not counted again
        self.n_tokens = self.n_segments = self.n_counted = 0
        # tokens of the context that was yielded last
        self.shown: list[ShownToken] = []
        cuts_anywhere = self._encode("a\na") == self._encode("a") + self._encode("\na")
        self.cut = BEFORE_WHITE_SPACE if cuts_anywhere else BEFORE_SPACE

    def _ask(self, query: str) -> None:
        """Put a question before each segment from now on."""
        segment_size = self.model.config.segment_size
        # the configuration fills in the size
        assert segment_size is not None
        leading, self.trailing = special_tokens_around(self.tokenizer)
        (ids,) = self.encoder.queries([query])
        room = segment_size - len(leading) - len(self.trailing)
        check_query(len(ids), room, segment_size, "--query")
        self.query, self.leading, self.room = query.strip(), [*leading, *ids], room - len(ids)

    def feed(self, text: str) -> Iterator[BaseModelOutput]:
        """Add `text` to the document, and encode all complete segments except the last.

        Yields:
            Decoder context after each encoder call, for `generate(encoder_outputs=...)`.
        """
        for start in range(0, len(text), BLOCK):
            self.bookmark.text += text[start : start + BLOCK]
            end = self._end_of_words(self.bookmark.text)
            if end:
                self.bookmark.tokens += self._tokens_behind_context(end)
                self.bookmark.position += end
                self.bookmark.text, self.bookmark.context = self.bookmark.text[end:], ""
            self._take_sentences(self.bookmark)
            yield from self._full_segments(self.bookmark)

    def finish(self) -> Iterator[BaseModelOutput]:
        """Encode the rest as the end of the text; the bookmark stays the same, so `feed` can add more text later.

        Yields decoder contexts as `feed` does; the last one covers the whole text. Raises ValueError without any text.
        """
        end = replace(self.bookmark, tokens=self.bookmark.tokens + self._tokens_behind_context())
        if not end.tokens:
            raise ValueError("the text has no tokens")
        n_kept = len(end.tokens)
        yield from self._full_segments(end)
        output = self._read(end, 1)
        self.n_counted = n_kept
        yield output

    def end_section(self) -> Iterator[BaseModelOutput]:
        """Encode the rest as the end of a section, as training does; `feed` then begins the next section.

        Yields decoder contexts as `feed` does; the last one belongs to the section. Yields nothing without new text.
        """
        mark = self.bookmark
        # sections of training documents end without a line end
        mark.tokens += self._tokens_behind_context(len(mark.text.rstrip()))
        mark.position += len(mark.text)
        mark.text = mark.context = ""
        if not mark.tokens:
            return
        mark.tokens = [*mark.tokens[:-1], mark.tokens[-1]._replace(ends_passage=True)]
        yield from self._full_segments(mark)
        output = self._read(mark, 1, ends_section=True)
        mark.overlap = []
        yield output

    def skip(self, n_characters: int) -> None:
        """Count characters in front of the next text that are not read, so that citations keep their positions."""
        self.bookmark.position += n_characters

    @property
    def is_between_sections(self) -> bool:
        """True if no text has arrived since the last section's end, or since the beginning."""
        return not self.bookmark.tokens and not self.bookmark.text.strip()

    def save(self, path: Path, notes: dict[str, Any] | None = None) -> None:
        """Write the bookmark for a reader of the same model; raise ValueError if the file cannot be written.

        A crash leaves the old file or the new one. `notes` are JSON values of the caller, which `load` returns.
        """
        draft = path.with_name(path.name + ".tmp")
        try:
            self.write(draft, notes)
            replace_and_fsync(draft, path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error})") from error

    def write(self, path: Path, notes: dict[str, Any] | None = None) -> None:
        """Write the bookmark as `save` does, but not atomically; raise OSError if the file cannot be written."""
        mark = self.bookmark
        tensors = {
            "ids": torch.tensor([token.id for token in mark.tokens], dtype=torch.long),
            "overlap": torch.tensor([token.id for token in mark.overlap], dtype=torch.long),
            "spans": as_tensor(mark.shown, [*mark.overlap, *mark.tokens]),
        }
        if mark.state is not None:
            tensors |= {f"state.{name}": tensor.cpu().clone() for name, tensor in mark.state.tensors().items()}
        metadata = {
            "format": FORMAT,
            "text": mark.text,
            "context": mark.context,
            "query": self.query,
            "reader": json.dumps(self._identity()),
            "counts": json.dumps({name: getattr(mark, name) for name in COUNTS}),
            "notes": json.dumps(notes or {}),
        }
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    def load(self, path: Path) -> dict[str, Any]:
        """Load a bookmark, and return its notes. A reader without a question takes over the question of the file.

        Raises:
            ValueError: The file is unreadable, or was saved with another model, tokenizer or question.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: the saved state cannot be read ({error})") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path}: not a saved state: format {metadata.get('format')!r} found, {FORMAT!r} required")
        try:
            reader, notes = json.loads(metadata["reader"]), json.loads(metadata.get("notes", "{}"))
            text, context, query = metadata["text"], metadata["context"], metadata["query"].strip()
            counts = json.loads(metadata["counts"])
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a saved state: {error} in its metadata") from error
        if not isinstance(reader, dict) or not isinstance(notes, dict):
            raise ValueError(f"{path}: not a saved state: its metadata are no objects")
        check_counts(counts, COUNTS, path)
        self._check_same(reader, path)
        if self.query not in ("", query):
            raise ValueError(f"{path}: the state was saved with the query {query!r}, not with {self.query!r}")
        check_tensors(tensors, self.model.config, path)
        self._ask(query)
        state = {name.removeprefix("state."): tensor for name, tensor in tensors.items() if name.startswith("state.")}
        overlap = tensors["overlap"].tolist()
        shown, waiting = from_tensor(tensors["spans"], [*overlap, *tensors["ids"].tolist()])
        self.bookmark = Bookmark(
            state=RecurrentState.from_tensors(state).to(self.model.device, self.model.dtype) if state else None,
            overlap=waiting[: len(overlap)],
            tokens=waiting[len(overlap) :],
            text=text,
            context=context,
            **counts,
            shown=shown,
        )
        self.n_counted = len(self.bookmark.tokens) + len(self._tokens_behind_context())
        return notes

    def _end_of_words(self, text: str) -> int:
        """Return the last index at which cutting the text does not change its ids."""
        found = self.cut.match(text)
        if found:
            return found.end()
        return len(text) if len(text) > LONGEST_WORD else 0

    def _take_sentences(self, mark: Bookmark) -> None:
        """Move the tokens of whole sentences from the text to the tokens, for scripts without white space."""
        whole = mark.context + mark.text
        places = [found.start() for found in SENTENCE_CUT.finditer(whole, 0, max(0, len(whole) - LOOKAHEAD))]
        for place in reversed(places[-N_PLACES:]):
            if place <= len(mark.context):
                break
            start = max((it for it in places if it <= place - LOOKAHEAD), default=0)
            behind = whole[place : place + 2 * LOOKAHEAD]
            texts = mark.context, whole[:place], whole[:place] + behind, whole[start:place], whole[start:place] + behind
            old, ids, longer, context, both = self.encoder(texts)
            is_end = longer[: len(ids)] == ids and both[: len(context)] == context
            if is_end and both[len(context) :] == longer[len(ids) :]:
                self._take(mark, whole[:place], behind, len(old))
                mark.text, mark.context = whole[place:], whole[start:place]
                return
        # a word segmenter cuts by the whole sentence, so its words are never settled inside a sentence
        if not joins_words(self.tokenizer):
            while len(mark.text) > LONGEST_SENTENCE and self._take_settled(mark):
                pass

    def _take(self, mark: Bookmark, text: str, behind: str, n_context: int) -> None:
        """Add the tokens of `text`, which begins with the bookmark's context, without the context's `n_context`."""
        n_before = mark.position - len(mark.context)
        mark.tokens += [token.moved(n_before) for token in self.encoder.tokens(text, behind)[n_context:]]
        mark.position = n_before + len(text)

    def _take_settled(self, mark: Bookmark) -> bool:
        """Move tokens of a long sentence's middle that no later text can change. Return True if there are any."""
        rest_of_text = mark.text[LONGEST_SENTENCE:]
        whole = mark.context + mark.text[:LONGEST_SENTENCE]
        for place in range(len(whole) - 2 * LOOKAHEAD, len(whole) - 3 * LOOKAHEAD, -1):
            start = max(0, place - CONTEXT)
            ids, rest = self._settled(whole, place)
            context, same_rest = self._settled(whole[start:], place - start)
            if ids and context and rest == same_rest:
                self._take(mark, whole[:place], whole[place:], len(self._encode(mark.context)))
                mark.text, mark.context = whole[place:] + rest_of_text, whole[start:place]
                return True
        return False

    def _settled(self, text: str, place: int) -> tuple[list[int], list[int]]:
        """Return the ids before and after a place, and none before it if an earlier end of the text changes them.

        A token has at most `LOOKAHEAD` characters. So the best tokens of any longer text go on from the best tokens of
        the text up to one of its last `LOOKAHEAD` places (Viterbi search of unigram models).
        """
        ends = range(len(text), len(text) - LOOKAHEAD - 1, -1)
        ids, whole, *shorter = self.encoder([text[:place], *(text[:end] for end in ends)])
        is_settled = all(other[: len(ids)] == ids for other in (whole, *shorter))
        return ids if is_settled else [], whole[len(ids) :]

    def _tokens_behind_context(self, end: int | None = None) -> list[Token]:
        """Return the tokens of the bookmark's text up to `end`, which follows the bookmark's context."""
        mark = self.bookmark
        text, behind = mark.text[:end], "" if end is None else mark.text[end : end + LOOKAHEAD]
        if not text:
            return []
        n_context = len(self._encode(mark.context)) if mark.context else 0
        tokens = self.encoder.tokens(mark.context + text, behind)[n_context:]
        return [token.moved(mark.position - len(mark.context)) for token in tokens]

    def _encode(self, text: str) -> list[int]:
        return self.encoder([text])[0]

    def _full_segments(self, mark: Bookmark) -> Iterator[BaseModelOutput]:
        # the last full segment may be the end of the text, so it waits for more
        while len(mark.tokens) > self.room:
            yield self._read(mark, min((len(mark.tokens) - 1) // self.room, self.segments_per_call))

    @torch.no_grad()
    def _read(self, mark: Bookmark, n_segments: int, ends_section: bool = False) -> BaseModelOutput:
        """Encode the next segments, cut as `split_into_segments` cuts a document, and advance the bookmark."""
        segments = [self._take_segment(mark) for _ in range(n_segments)]
        ids = torch.tensor(pad_segments([[[token.id for token in segment] for segment in segments]], padding=-1))
        is_token = ids >= 0
        input_ids = ids.masked_fill(~is_token, self.model.config.pad_token_id).to(self.model.device)
        targets = torch.arange(n_segments).eq(n_segments - 1).unsqueeze(0) if ends_section else None
        output = self.model.model.encode(input_ids, is_token.long(), target_segments=targets, state=mark.state)
        mark.state = output.state
        self.shown = show_segments(mark.shown, segments, self.model.config)
        mark.shown = after_section(self.shown, self.model.config) if ends_section else self.shown
        mark.n_segments += n_segments
        self.n_segments += n_segments
        # the only context is the one after the last segment, which `generate` takes without target segments
        return replace(output, target_segments=None)

    def _take_segment(self, mark: Bookmark) -> list[Token]:
        new, mark.tokens = mark.tokens[: self.room], mark.tokens[self.room :]
        segment = [*map(Token, self.leading), *mark.overlap, *new, *map(Token, self.trailing)]
        if self.n_overlap:
            mark.overlap = [*mark.overlap, *new][-self.n_overlap :]
        mark.n_tokens += len(new)
        n_again = min(self.n_counted, len(new))
        self.n_counted -= n_again
        self.n_tokens += len(new) - n_again
        return segment

    def _identity(self) -> dict[str, Any]:
        """Return the configuration fields, tokenizer and weights that the values of a saved state depend on."""
        fields = {name: getattr(self.model.config, name) for name in STATE_FIELDS}
        return {**fields, "tokenizer": tokenizer_identity(self.tokenizer), "weights": weights_identity(self.model)}

    def _check_same(self, saved: dict[str, Any], path: Path) -> None:
        for name, here in self._identity().items():
            if saved.get(name) != here:
                raise ValueError(
                    f"{path}: the state was saved with a different model: {name} is {saved.get(name)!r} in the file, "
                    f"{here!r} in this model"
                )


def weights_identity(model: torch.nn.Module) -> str:
    """Hash the first 8 elements of each parameter, with the same result in every precision."""
    heads = [parameter.detach().flatten()[:8].float().cpu() for parameter in model.parameters()]
    return hashlib.sha256(torch.cat(heads).bfloat16().view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def summary_after(
    output: BaseModelOutput,
    model: RecurrentBartForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    **generation: Any,
) -> str:
    """Generate a text from a context that `TextReader` yields; `generation` holds arguments of `generate`."""
    ids = model.generate(encoder_outputs=output, **generation)
    return decode_text(tokenizer, ids[0]).strip()


def load_model(
    folder: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> tuple[RecurrentBartForConditionalGeneration, PreTrainedTokenizerBase]:
    """Load a model in evaluation mode, and its tokenizer; raise ValueError if the folder has none."""
    check_model_place("--model", folder)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    with reading_model("--model", folder):
        model = load_pretrained(RecurrentBartForConditionalGeneration, folder, _warn, dtype=dtype)
    return model.to(device).eval(), tokenizer


def _warn(text: str) -> None:
    if is_first():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def run_flags(model_folder: str) -> dict[str, dict[str, Any]]:
    """Return the flags, by group, of the training run that saved the model `RUN/model`; empty without a run."""
    run = RunFolder(Path(model_folder).resolve().parent)
    if not run.config_file.is_file():
        return {}
    return run.read_config().get("arguments", {})
