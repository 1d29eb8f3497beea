"""Reading a text of any length in constant memory, and going on with it another day.

Shape suffixes: A attended length, D model width.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from recurrent_bart.data.corpus import tokenizer_identity
from recurrent_bart.data.text_encoder import TextEncoder
from recurrent_bart.data.tokenizer import load_tokenizer, special_tokens_around
from recurrent_bart.distributed import is_first
from recurrent_bart.model.loading import load_pretrained
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.model.saved_models import check_model_place, reading_model
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from recurrent_bart.recurrence.segmentation import pad_segments
from recurrent_bart.run_folder import RunFolder

# raised when what a saved reading holds changes
FORMAT = "recurrent_bart reading 2"
# what a state's numbers depend on beside the weights
STATE_FIELDS = (
    "pre_seq_len",
    "d_model",
    "encoder_layers",
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
# characters tokenised in one call
BLOCK = 2**16
# segments read in one call, so that they can be computed by diagonals
SEGMENTS_PER_CALL = 32
# characters without white space after which a text is cut all the same, at the cost of a token or two
LONGEST_WORD = 2**20
# In front of white space, so that no word or run of spaces is cut. Not where "▁" follows, by which unigram tokenizers
# mark a space.
BEFORE_SPACE = re.compile(r"(?s).*(?<=\S)(?= \s*[^\s▁])")
BEFORE_WHITE_SPACE = re.compile(r"(?s).*(?<=\S)(?=[ \t\n\r]\s*[^\s▁])")


@dataclass
class Bookmark:
    """Where the reading of a text stands.

    Attributes:
        state: What has been read; None at the beginning.
        overlap: Ids read last, which stand in front of the next segment again.
        ids: Ids that have come since. They may be the last segment, so they are not read yet.
        text: What has come since and may go on within a word.
    """

    state: RecurrentState | None = None
    overlap: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    text: str = ""


class TextReader:
    """Reads a text as it comes: segments and numbers are those of the whole text read at once.

    What is kept is the state, the text of some segments, and nothing of what was read before. (With `decoder_context`
    other than `"last"`, and no limit by `context_segments`, the state itself grows with every segment.)

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        segments_per_call: Most segments that are read together; 1: what comes after each of them is given.
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
        # the configuration has filled them
        assert segment_size is not None
        assert input_size is not None
        self.room = segment_size - len(self.leading) - len(self.trailing)
        self.n_overlap = input_size - segment_size
        self.bookmark = Bookmark()
        # of this reader, not of one whose bookmark was loaded
        self.n_tokens = self.n_segments = 0
        cuts_anywhere = self._encode("a\na") == self._encode("a") + self._encode("\na")
        self.cut = BEFORE_WHITE_SPACE if cuts_anywhere else BEFORE_SPACE

    def feed(self, text: str) -> Iterator[BaseModelOutput]:
        """Take more of the text, and read the segments that are complete and not the last.

        Yields:
            What the decoder attends to after the segments that were read together, for `generate(encoder_outputs=...)`.
        """
        for start in range(0, len(text), BLOCK):
            self.bookmark.text += text[start : start + BLOCK]
            end = self._end_of_words(self.bookmark.text)
            whole, self.bookmark.text = self.bookmark.text[:end], self.bookmark.text[end:]
            self.bookmark.ids += self._encode(whole)
            yield from self._full_segments(self.bookmark)

    def finish(self) -> Iterator[BaseModelOutput]:
        """Read the rest, as the end of the text. The bookmark stays before it, where more text may be fed.

        Yields:
            As `feed`; the last one is what the whole text is summarised from.

        Raises:
            ValueError: There was no text at all.
        """
        end = replace(self.bookmark, ids=self.bookmark.ids + self._encode(self.bookmark.text))
        if not end.ids:
            raise ValueError("a document of 0 tokens has nothing to read")
        yield from self._full_segments(end)
        yield self._read(end, 1)

    def save(self, path: Path) -> None:
        """Write the bookmark, so that a reader of the same model can go on from it.

        Raises:
            ValueError: The file cannot be written.
        """
        mark = self.bookmark
        tensors = {"ids": torch.tensor(mark.ids), "overlap": torch.tensor(mark.overlap)}
        tensors = {name: ids.long() for name, ids in tensors.items()}
        if mark.state is not None:
            tensors |= {f"state.{name}": tensor.cpu().clone() for name, tensor in mark.state.tensors().items()}
        metadata = {"format": FORMAT, "text": mark.text, "reader": json.dumps(self._identity())}
        draft = path.with_name(path.name + ".tmp")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft, metadata)
            os.replace(draft, path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be written ({error})") from error

    def load(self, path: Path) -> None:
        """Go on from a saved bookmark.

        Raises:
            ValueError: The file is not one, or of another model or tokenizer; the message says what differs.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: no saved state can be read ({error})") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path}: not a saved state: its format is {metadata.get('format')!r}, not {FORMAT!r}")
        self._check_same(json.loads(metadata["reader"]), path)
        state = {name.removeprefix("state."): tensor for name, tensor in tensors.items() if name.startswith("state.")}
        self.bookmark = Bookmark(
            state=RecurrentState.from_tensors(state).to(self.model.device, self.model.dtype) if state else None,
            overlap=tensors["overlap"].tolist(),
            ids=tensors["ids"].tolist(),
            text=metadata["text"],
        )

    def _end_of_words(self, text: str) -> int:
        """The last place where a text can be cut so that the ids of the parts are those of the whole."""
        found = self.cut.match(text)
        if found:
            return found.end()
        return len(text) if len(text) > LONGEST_WORD else 0

    def _encode(self, text: str) -> list[int]:
        return self.encoder([text])[0]

    def _full_segments(self, mark: Bookmark) -> Iterator[BaseModelOutput]:
        # a segment that nothing has come after may be the last one
        while len(mark.ids) > self.room:
            yield self._read(mark, min((len(mark.ids) - 1) // self.room, self.segments_per_call))

    @torch.no_grad()
    def _read(self, mark: Bookmark, n_segments: int) -> BaseModelOutput:
        """Read segments, as `split_into_segments` would cut them, and move the bookmark behind them."""
        ids = torch.tensor(pad_segments([[self._take_segment(mark) for _ in range(n_segments)]], padding=-1))
        is_token = ids >= 0
        input_ids = ids.masked_fill(~is_token, self.model.config.pad_token_id).to(self.model.device)
        output = self.model.model.encode(input_ids, is_token.long(), state=mark.state)
        mark.state = output.state
        self.n_segments += n_segments
        return output

    def _take_segment(self, mark: Bookmark) -> list[int]:
        new, mark.ids = mark.ids[: self.room], mark.ids[self.room :]
        segment = [*self.leading, *mark.overlap, *new, *self.trailing]
        if self.n_overlap:
            mark.overlap = [*mark.overlap, *new][-self.n_overlap :]
        self.n_tokens += len(new)
        return segment

    def _identity(self) -> dict[str, Any]:
        """All that a saved state's numbers depend on."""
        fields = {name: getattr(self.model.config, name) for name in STATE_FIELDS}
        return {**fields, "tokenizer": tokenizer_identity(self.tokenizer), "weights": weights_identity(self.model)}

    def _check_same(self, saved: dict[str, Any], path: Path) -> None:
        for name, here in self._identity().items():
            if saved.get(name) != here:
                raise ValueError(
                    f"{path}: the state is of another model, {name} is {saved.get(name)!r} there and {here!r} here"
                )


def weights_identity(model: torch.nn.Module) -> str:
    """Hash of some of each parameter, the same in every precision."""
    heads = [parameter.detach().flatten()[:8].float().cpu() for parameter in model.parameters()]
    return hashlib.sha256(torch.cat(heads).bfloat16().view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def summary_after(
    output: BaseModelOutput,
    model: RecurrentBartForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    **generation: Any,
) -> str:
    """Text generated from what a reader gave.

    Args:
        output: Of `TextReader.feed` or `TextReader.finish`.
        model: Of the reader.
        tokenizer: Of the reader.
        generation: Arguments of `generate`.
    """
    ids = model.generate(encoder_outputs=output, **generation)
    return tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def load_model(
    folder: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> tuple[RecurrentBartForConditionalGeneration, PreTrainedTokenizerBase]:
    """A saved model in evaluation mode, and its tokenizer.

    Raises:
        ValueError: There is none in the folder.
    """
    check_model_place("--model", folder)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    with reading_model("--model", folder):
        model = load_pretrained(RecurrentBartForConditionalGeneration, folder, _warn, dtype=dtype)
    return model.to(device).eval(), tokenizer


def _warn(text: str) -> None:
    if is_first():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def run_flags(model_folder: str) -> dict[str, dict[str, Any]]:
    """The flags, by group, of the run that a model `RUN/model` came from; none where it came from no run.

    Raises:
        ValueError: The run's configuration is unreadable.
    """
    run = RunFolder(Path(model_folder).resolve().parent)
    if not run.config_file.is_file():
        return {}
    return run.read_config().get("arguments", {})
