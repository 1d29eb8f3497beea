"""Streaming reader: encodes a text of any length in parts, and can continue from a saved state."""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from recurrent_bart.data.batches import check_query
from recurrent_bart.data.text_encoder import TextEncoder, Token, decode_text
from recurrent_bart.data.tokenizer import load_tokenizer, special_tokens_around
from recurrent_bart.data.tokenizer_identity import tokenizer_identity
from recurrent_bart.distributed import is_first
from recurrent_bart.files import replace_and_fsync
from recurrent_bart.inference.bookmark import PIECE, Bookmark, TextCutter
from recurrent_bart.inference.saved_state import (
    PREFIX,
    QUERY_CHARACTERS,
    check_counts,
    check_names,
    check_sizes,
    check_tensors,
)
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
# characters tokenized before their segments are read, enough for the wavefront schedule
BLOCK = 2**16
# segments read in one call, enough for the wavefront schedule
SEGMENTS_PER_CALL = 32


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
        self.cutter = TextCutter(self.encoder)

    def _ask(self, query: str) -> None:
        """Put a question before each segment from now on."""
        segment_size = self.model.config.segment_size
        # the configuration fills in the size
        assert segment_size is not None
        if len(query) > QUERY_CHARACTERS:
            raise ValueError(f"--query: it has {len(query)} characters; at most {QUERY_CHARACTERS} are allowed")
        leading, self.trailing = special_tokens_around(self.tokenizer)
        (ids,) = self.encoder.queries([query])
        room = segment_size - len(leading) - len(self.trailing)
        check_query(len(ids), room, segment_size, "--query")
        self.query, self.leading, self.room = query.strip(), [*leading, *ids], room - len(ids)

    def feed(self, text: str) -> Iterator[BaseModelOutput]:
        """Add `text` to the document, and encode all complete segments except the last.

        Returns an iterator, which does the work, over the decoder context after each encoder call, for
        `generate(encoder_outputs=...)`.
        """
        return (output for output in self.feed_in_steps(text) if output is not None)

    def feed_in_steps(self, text: str) -> Iterator[BaseModelOutput | None]:
        """Add `text` as `feed` does, and yield None after each piece of characters that is tokenized."""
        for start in range(0, len(text), PIECE):
            end = start + PIECE
            self.bookmark.text += text[start:end]
            self.cutter.take_settled_text(self.bookmark)
            yield None
            if end % BLOCK == 0 or end >= len(text):
                yield from self._full_segments(self.bookmark)

    def finish(self) -> Iterator[BaseModelOutput]:
        """Encode the rest as the end of the text; the bookmark stays the same, so `feed` can add more text later.

        As in documents of training, white space at the end is not read.

        Yields decoder contexts as `feed` does; the last one covers the whole text. Raises ValueError without any text.
        """
        end = replace(self.bookmark, tokens=self.bookmark.tokens + self._rest())
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
        mark.tokens += self._rest()
        mark.position += len(mark.text)
        mark.text = mark.context = ""
        if not mark.tokens:
            return
        mark.tokens = [*mark.tokens[:-1], mark.tokens[-1]._replace(ends_passage=True)]
        yield from self._full_segments(mark)
        output = self._read(mark, 1, ends_section=True)
        mark.overlap = []
        yield output

    def _rest(self) -> list[Token]:
        """Return the tokens of the text that is not tokenized yet, without white space at its end."""
        return self.cutter.waiting_tokens(self.bookmark, len(self.bookmark.text.rstrip()))

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
            tensors |= {f"{PREFIX}{name}": tensor.cpu().clone() for name, tensor in mark.state.tensors().items()}
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
                metadata, names = file.metadata() or {}, file.keys()
                # a stranger's file may have many names and long texts
                _check_format(metadata.get("format"), path)
                check_names(names, path)
                check_sizes(metadata, path)
                tensors = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: the saved state cannot be read ({error})") from error
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
        state = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
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
        self.n_counted = len(self.bookmark.tokens) + self.cutter.n_waiting_tokens(self.bookmark)
        return notes

    def _full_segments(self, mark: Bookmark) -> Iterator[BaseModelOutput]:
        # the last full segment may be the end of the text, so it waits for more
        while len(mark.tokens) > self.room:
            yield self._read(mark, min((len(mark.tokens) - 1) // self.room, self.segments_per_call))

    @torch.no_grad()
    def _read(self, mark: Bookmark, n_segments: int, ends_section: bool = False) -> BaseModelOutput:
        """Encode the next segments, cut as `split_into_segments` cuts a document, and advance the bookmark."""
        segments = [self._take_segment(mark) for _ in range(n_segments)]
        ids = pad_segments([[[token.id for token in segment] for segment in segments]], padding=-1)
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


def _check_format(found: str | None, path: Path) -> None:
    if found != FORMAT:
        shown = repr(found if found is None else found[: 2 * len(FORMAT)])
        raise ValueError(f"{path}: not a saved state: format {shown} found, {FORMAT!r} required")


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
