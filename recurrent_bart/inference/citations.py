"""Citations: the passages of a text that each sentence of its summary was read from, by cross-attention.

Shape suffixes: S sentences of a summary, T target length, A attended length, H heads.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recurrent_bart.data.text_encoder import decode_text
from recurrent_bart.data.words import sentence_ends
from recurrent_bart.execution.module_settings import changed_fields
from recurrent_bart.inference.shown_tokens import ShownToken
from recurrent_bart.model.modeling_outputs import RecurrentEncoderOutput
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration

# Tokens after which a passage ends without an end of a sentence.
LONGEST_PASSAGE = 64
# Passages that a sentence cites at most, and the least weight of a passage.
MOST_PASSAGES, LEAST_WEIGHT = 8, 0.01
Span = tuple[int, int]


@dataclass(frozen=True)
class CitedPassage:
    """Passage of the source: a sentence, or a whole segment that only the state shows.

    Attributes:
        start: Index of the first character in everything that was read. Characters are Unicode code points.
        end: Index behind the last character.
        weight: Share of the sentence's attention on passages, 0 to 1.
    """

    start: int
    end: int
    weight: float


@dataclass(frozen=True)
class Citation:
    """Passages that one sentence of a summary was read from.

    Attributes:
        start: Index of the sentence's first character in the summary.
        end: Index behind the sentence's last character.
        passages: Passages by falling weight. Small ones are left out, so the weights may add up to less than 1.
        state_share: Share of all attention that is on the state, 0 to 1.
    """

    start: int
    end: int
    passages: list[CitedPassage]
    state_share: float


@torch.no_grad()
def cite(
    model: RecurrentBartForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    context: RecurrentEncoderOutput,
    shown: Sequence[ShownToken],
    ids_T: Tensor,
) -> list[Citation]:
    """Return a citation for each sentence of a generated text.

    The decoder reads the text again, with eager attention. A passage's weight is the cross-attention on its tokens
    while the sentence's tokens were written: mean over these tokens, over heads and over `cited_layers`. Special tokens
    and the question have no weight. With `decoder_context` `"last"` and `"memory"` only the last segment's tokens are
    attended to; `"memory"` cites earlier segments as a whole, by the attention on the state after each segment.

    Args:
        context: Context of one document, `(1, A, D)`.
        shown: Tokens of the context in its order; see `show_segments`.
        ids_T: Generated ids, with the decoder's start id.

    Raises:
        ValueError: The tokens are not the tokens of this context, for example after the state of another text.
    """
    ids_T = ids_T[: int(ids_T.ne(model.config.pad_token_id).nonzero().max()) + 1]
    text, ends = _character_ends(tokenizer, ids_T[1:])
    sentences = list(_sentence_spans(text))
    if not sentences:
        return []
    writes_ST = torch.tensor([_writes(sentence, ends) for sentence in sentences], device=ids_T.device)
    weights_SA = _attention(model, context, ids_T[:-1], writes_ST / writes_ST.sum(dim=1, keepdim=True))
    read_SA, state_share_S = _by_token(model, weights_SA, context, shown)
    spans, number_of = _passages(shown)
    cited = torch.tensor([number is not None for number in number_of])
    numbers = torch.tensor([number for number in number_of if number is not None], dtype=torch.long)
    passages = read_SA.new_zeros(len(sentences), len(spans)).index_add_(1, numbers, read_SA[:, cited])
    passages = passages / passages.sum(dim=1, keepdim=True).clamp(min=torch.finfo(passages.dtype).tiny)
    return [
        Citation(start, end, _heaviest(spans, row), round(share, 4))
        for (start, end), row, share in zip(sentences, passages.tolist(), state_share_S.tolist(), strict=True)
    ]


def cited_layers(model: RecurrentBartForConditionalGeneration) -> list[Any]:
    """Return the decoder layers whose attention is cited."""
    layers = model.model.decoder.layers
    return list(layers[-(-len(layers) // 2) :])


def _character_ends(tokenizer: PreTrainedTokenizerBase, ids_T: Tensor) -> tuple[str, list[int]]:
    """Return the text of ids, and for each token the number of characters written after it."""
    text = decode_text(tokenizer, ids_T).strip()
    # a part of a letter is decoded to another letter, so only what stays counts
    parts = (decode_text(tokenizer, ids_T[:end]).lstrip() for end in range(1, len(ids_T) + 1))
    return text, [_n_equal(text, part) for part in parts]


def _n_equal(text: str, part: str) -> int:
    """Return the number of first characters that two texts have in common."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, part, strict=False)))


def _sentence_spans(text: str) -> Iterator[Span]:
    start = 0
    for end in [*sentence_ends(text), len(text)]:
        sentence = text[start:end]
        if sentence.strip():
            begin = start + len(sentence) - len(sentence.lstrip())
            yield begin, start + len(sentence.rstrip())
        start = end


def _writes(sentence: Span, ends: Sequence[int]) -> list[float]:
    """Return 1 for each token that writes a character of the sentence, else 0."""
    starts = [0, *ends]
    return [float(start < sentence[1] and end > sentence[0]) for start, end in zip(starts, ends, strict=False)]


def _attention(
    model: RecurrentBartForConditionalGeneration, context: RecurrentEncoderOutput, ids_T: Tensor, mean_ST: Tensor
) -> Tensor:
    """Return the attention weights on each position of the context, `(S, A)`, mean over layers, heads and tokens."""
    found: list[Tensor] = []

    def collect(_module: Any, _arguments: Any, output: tuple[Tensor, Tensor]) -> None:
        # a closed gate makes weights negative
        weights_TA = output[1][0].float().abs().mean(dim=0)
        found.append(mean_ST @ weights_TA)

    with contextlib.ExitStack() as stack:
        stack.enter_context(changed_fields(model.config, _attn_implementation="eager"))
        for layer in cited_layers(model):
            handle = layer.encoder_attn.register_forward_hook(collect)
            stack.callback(handle.remove)
        model.model.decode(context, input_ids=ids_T.unsqueeze(0), use_cache=False)
    return torch.stack(found).mean(dim=0).cpu()


def _by_token(
    model: RecurrentBartForConditionalGeneration,
    weights_SA: Tensor,
    context: RecurrentEncoderOutput,
    shown: Sequence[ShownToken],
) -> tuple[Tensor, Tensor]:
    """Return the weights of `shown`, and the share of the weights on the state, `(S,)`."""
    n_memory, is_seen = context.n_memory or 0, context.context_mask[0].bool().cpu()  # type: ignore[index]
    state_SA, token_SA = (
        weights_SA[:, :n_memory][:, is_seen[:n_memory]],
        weights_SA[:, n_memory:][:, is_seen[n_memory:]],
    )
    share_S = state_SA.sum(dim=1) / weights_SA.sum(dim=1)
    if model.config.decoder_context == "memory" and n_memory:
        # the context has a state after each segment; the last state holds all segments
        earlier = [part.sum(dim=1) for part in state_SA.split(model.config.pre_seq_len, dim=1)[:-1]]
        token_SA = torch.cat([*(part.unsqueeze(1) for part in earlier), token_SA], dim=1)
    if token_SA.shape[1] != len(shown):
        raise ValueError(f"citations: the context has {token_SA.shape[1]} tokens, but {len(shown)} are known")
    return token_SA, share_S


def _passages(shown: Sequence[ShownToken]) -> tuple[list[Span], list[int | None]]:
    """Return the passages of a context in their order, and the passage of each token; None: a special token."""
    ends_passage: dict[Span, bool] = {}
    for token in shown:
        # an overlap shows tokens twice
        if token.start >= 0:
            ends_passage[token.start, token.end] = token.ends_passage
    spans: list[Span] = []
    numbers: dict[Span, int] = {}
    n_tokens, is_over = 0, True
    for start, end in sorted(ends_passage):
        if is_over or n_tokens == LONGEST_PASSAGE:
            spans.append((start, end))
            n_tokens = 0
        spans[-1] = spans[-1][0], max(spans[-1][1], end)
        numbers[start, end] = len(spans) - 1
        n_tokens, is_over = n_tokens + 1, ends_passage[start, end]
    return spans, [numbers.get((token.start, token.end)) for token in shown]


def _heaviest(spans: Sequence[Span], weights: Sequence[float]) -> list[CitedPassage]:
    order = sorted(range(len(spans)), key=lambda number: -weights[number])[:MOST_PASSAGES]
    return [
        CitedPassage(*spans[number], round(weights[number], 4))
        for number in order
        if weights[number] >= LEAST_WEIGHT and spans[number][0] < spans[number][1]
    ]
