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

from recurrent_bart.data.text_encoder import TextEncoder, decode_text
from recurrent_bart.data.tokenizer import load_tokenizer, special_tokens_around
from recurrent_bart.data.tokenizer_identity import tokenizer_identity
from recurrent_bart.distributed import is_first
from recurrent_bart.files import replace_and_fsync
from recurrent_bart.inference.saved_state import check_counts, check_tensors
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
COUNTS = ("n_characters", "n_tokens", "n_segments")
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


@dataclass
class Bookmark:
    """Position in a text that is being read.

    Attributes:
        state: State after the segments read so far; None at the beginning.
        overlap: Last ids that were read; the next segment begins with them.
        ids: Ids not read yet, because they may belong to the last segment of the text.
        text: Characters not tokenized yet, because the next part may continue the last word.
        context: Characters in front of `text` whose ids are read already, because the ids of `text` depend on them;
            empty if the text in front ends with a word and white space follows.
        n_characters: Characters of the text so far, `text` included.
        n_tokens: Tokens in front of `ids`, without special tokens.
        n_segments: Segments in front of `ids`.
    """

    state: RecurrentState | None = None
    overlap: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    text: str = ""
    context: str = ""
    n_characters: int = 0
    n_tokens: int = 0
    n_segments: int = 0


class TextReader:
    """Reader of a text that arrives in parts; segments and results are the same as for the whole text at once.

    The reader keeps only the state and the text of a few segments. The state itself grows with every segment unless
    `decoder_context="last"` or `context_segments` limits its size.

    Args:
        model: Model in evaluation mode.
        segments_per_call: Largest number of segments per encoder call; 1: yield the context after each segment.
    """

    def __init__(
        self,
        model: RecurrentBartForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        segments_per_call: int = SEGMENTS_PER_CALL,
    ):
        self.model, self.tokenizer, self.segments_per_call = model, tokenizer, segments_per_call
        self.encoder = TextEncoder(tokenizer)
        self.leading, self.trailing = special_tokens_around(tokenizer)
        segment_size, input_size = model.config.segment_size, model.config.input_size
        # the configuration fills in both sizes
        assert segment_size is not None
        assert input_size is not None
        self.room = segment_size - len(self.leading) - len(self.trailing)
        self.n_overlap = input_size - segment_size
        self.bookmark = Bookmark()
        # counts of this reader; tokens that a bookmark keeps are read again and not counted again
        self.n_tokens = self.n_segments = self.n_counted = 0
        cuts_anywhere = self._encode("a\na") == self._encode("a") + self._encode("\na")
        self.cut = BEFORE_WHITE_SPACE if cuts_anywhere else BEFORE_SPACE

    def feed(self, text: str) -> Iterator[BaseModelOutput]:
        """Add `text` to the document, and encode all complete segments except the last.

        Yields:
            Decoder context after each encoder call, for `generate(encoder_outputs=...)`.
        """
        self.bookmark.n_characters += len(text)
        for start in range(0, len(text), BLOCK):
            self.bookmark.text += text[start : start + BLOCK]
            end = self._end_of_words(self.bookmark.text)
            if end:
                self.bookmark.ids += self._ids_behind_context(self.bookmark.text[:end])
                self.bookmark.text, self.bookmark.context = self.bookmark.text[end:], ""
            self._take_sentences(self.bookmark)
            yield from self._full_segments(self.bookmark)

    def finish(self) -> Iterator[BaseModelOutput]:
        """Encode the rest as the end of the text; the bookmark stays the same, so `feed` can add more text later.

        Yields decoder contexts as `feed` does; the last one covers the whole text. Raises ValueError without any text.
        """
        end = replace(self.bookmark, ids=self.bookmark.ids + self._ids_behind_context(self.bookmark.text))
        if not end.ids:
            raise ValueError("the text has no tokens")
        n_kept = len(end.ids)
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
        mark.ids += self._ids_behind_context(mark.text.rstrip())
        mark.text = mark.context = ""
        if not mark.ids:
            return
        yield from self._full_segments(mark)
        output = self._read(mark, 1, ends_section=True)
        mark.overlap = []
        yield output

    @property
    def is_between_sections(self) -> bool:
        """True if no text has arrived since the last section's end, or since the beginning."""
        return not self.bookmark.ids and not self.bookmark.text.strip()

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
        tensors = {"ids": torch.tensor(mark.ids), "overlap": torch.tensor(mark.overlap)}
        tensors = {name: ids.long() for name, ids in tensors.items()}
        if mark.state is not None:
            tensors |= {f"state.{name}": tensor.cpu().clone() for name, tensor in mark.state.tensors().items()}
        metadata = {
            "format": FORMAT,
            "text": mark.text,
            "context": mark.context,
            "reader": json.dumps(self._identity()),
            "counts": json.dumps({name: getattr(mark, name) for name in COUNTS}),
            "notes": json.dumps(notes or {}),
        }
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    def load(self, path: Path) -> dict[str, Any]:
        """Load a bookmark, and return its notes.

        Raises:
            ValueError: The file is unreadable, or was saved with another model or tokenizer.
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
            counts = json.loads(metadata["counts"])
            text, context = metadata["text"], metadata["context"]
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a saved state: {error} in its metadata") from error
        if not isinstance(reader, dict) or not isinstance(notes, dict):
            raise ValueError(f"{path}: not a saved state: its metadata are no objects")
        check_counts(counts, COUNTS, path)
        self._check_same(reader, path)
        check_tensors(tensors, self.model.config, path)
        state = {name.removeprefix("state."): tensor for name, tensor in tensors.items() if name.startswith("state.")}
        self.bookmark = Bookmark(
            state=RecurrentState.from_tensors(state).to(self.model.device, self.model.dtype) if state else None,
            overlap=tensors["overlap"].tolist(),
            ids=tensors["ids"].tolist(),
            text=text,
            context=context,
            **counts,
        )
        self.n_counted = len(self.bookmark.ids) + len(self._ids_behind_context(self.bookmark.text))
        return notes

    def _end_of_words(self, text: str) -> int:
        """Return the last index at which cutting the text does not change its ids."""
        found = self.cut.match(text)
        if found:
            return found.end()
        return len(text) if len(text) > LONGEST_WORD else 0

    def _take_sentences(self, mark: Bookmark) -> None:
        """Move the ids of whole sentences from the text to the ids, for scripts without white space."""
        whole = mark.context + mark.text
        places = [found.start() for found in SENTENCE_CUT.finditer(whole, 0, max(0, len(whole) - LOOKAHEAD))]
        for place in reversed(places[-N_PLACES:]):
            if place <= len(mark.context):
                return
            start = max((it for it in places if it <= place - LOOKAHEAD), default=0)
            behind = whole[place : place + 2 * LOOKAHEAD]
            texts = mark.context, whole[:place], whole[:place] + behind, whole[start:place], whole[start:place] + behind
            old, ids, longer, context, both = self.encoder(texts)
            is_end = longer[: len(ids)] == ids and both[: len(context)] == context
            if is_end and both[len(context) :] == longer[len(ids) :]:
                mark.ids += ids[len(old) :]
                mark.text, mark.context = whole[place:], whole[start:place]
                return

    def _ids_behind_context(self, text: str) -> list[int]:
        """Return the ids of a text that follows the bookmark's context."""
        if not text:
            return []
        context, both = self.encoder([self.bookmark.context, self.bookmark.context + text])
        return both[len(context) :]

    def _encode(self, text: str) -> list[int]:
        return self.encoder([text])[0]

    def _full_segments(self, mark: Bookmark) -> Iterator[BaseModelOutput]:
        # the last full segment may be the end of the text, so it waits for more
        while len(mark.ids) > self.room:
            yield self._read(mark, min((len(mark.ids) - 1) // self.room, self.segments_per_call))

    @torch.no_grad()
    def _read(self, mark: Bookmark, n_segments: int, ends_section: bool = False) -> BaseModelOutput:
        """Encode the next segments, cut as `split_into_segments` cuts a document, and advance the bookmark."""
        ids = torch.tensor(pad_segments([[self._take_segment(mark) for _ in range(n_segments)]], padding=-1))
        is_token = ids >= 0
        input_ids = ids.masked_fill(~is_token, self.model.config.pad_token_id).to(self.model.device)
        targets = torch.arange(n_segments).eq(n_segments - 1).unsqueeze(0) if ends_section else None
        output = self.model.model.encode(input_ids, is_token.long(), target_segments=targets, state=mark.state)
        mark.state = output.state
        mark.n_segments += n_segments
        self.n_segments += n_segments
        # the only context is the one after the last segment, which `generate` takes without target segments
        return replace(output, target_segments=None)

    def _take_segment(self, mark: Bookmark) -> list[int]:
        new, mark.ids = mark.ids[: self.room], mark.ids[self.room :]
        segment = [*self.leading, *mark.overlap, *new, *self.trailing]
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
