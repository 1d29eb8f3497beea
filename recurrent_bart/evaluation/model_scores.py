"""Scores of texts by pretrained models: BERTScore and factual support."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from recurrent_bart.data.text_encoder import TextEncoder
from recurrent_bart.data.words import sentences

MODEL_SCORES = {
    "bertscore": "BERTScore: F1 of contextual embeddings, without idf weights and rescaling, times 100",
    "factuality": "sentences of the text supported by the source: mean probability, in percent",
}
# Names of the label of a supported sentence. A model of two labels without these names has it second, as MiniCheck.
SUPPORTED = ("supported", "supports", "support", "entailment", "entails", "consistent", "factual", "correct")
# Longest input of models that state no limit, and inputs per forward pass.
MOST_TOKENS = 512
BATCH_SIZE = 16

Item = TypeVar("Item")


class Scorer(Protocol):
    """Score of a text by name, computed from the text, its targets and its source."""

    def __call__(self, text: str, targets: Sequence[str], source: str) -> dict[str, float | None]:
        """Return the score; None where it is undefined."""


class BertScore:
    """BERTScore F1 (Zhang et al., ICLR 2020), of several targets the best. Long texts are embedded in parts.

    Raises:
        ValueError: The model cannot be loaded, or lacks the layer. Layer 0 is the embedding, -1 the last layer.
    """

    def __init__(self, path: str, layer: int, device: torch.device):
        model, self.tokenizer = _load(AutoModel, path, "--bertscore_model", device)
        self.model = model.get_encoder() if model.config.is_encoder_decoder else model
        n_layers = model.config.num_hidden_layers
        if not -n_layers - 1 <= layer <= n_layers:
            raise ValueError(f"--bertscore_layer {layer}: {path} has the layers 0 to {n_layers}; -1 is the last one")
        self.layer, self.device = layer, device
        self.encode, self.around = TextEncoder(self.tokenizer), _special_ids(self.tokenizer)
        self.room = _most_tokens(model.config, self.tokenizer) - sum(map(len, self.around))

    def __call__(self, text: str, targets: Sequence[str], source: str) -> dict[str, float | None]:
        """Return the BERTScore of the text; 0 if the text has no tokens."""
        own_TD = self._embed(text)
        scores = [_match(own_TD, target_TD) for target in targets if len(target_TD := self._embed(target))]
        return {"bertscore": max(scores, default=None)}

    @torch.no_grad()
    def _embed(self, text: str) -> Tensor:
        """Return the normalised embeddings of the text's tokens, without special tokens, `(T, D)`."""
        leading, trailing = self.around
        (ids,) = self.encode([text])
        parts = [torch.zeros(0, self.model.config.hidden_size, device=self.device)]
        for part in _batches(ids, self.room):
            input_ids = torch.tensor([[*leading, *part, *trailing]], device=self.device)
            hidden_TD = self.model(input_ids=input_ids, output_hidden_states=True).hidden_states[self.layer][0]
            parts.append(hidden_TD[len(leading) : len(leading) + len(part)].float())
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def _match(text_TD: Tensor, target_TD: Tensor) -> float:
    if not len(text_TD):
        return 0.0
    similarity = text_TD @ target_TD.T
    precision, recall = (float(similarity.max(dim=dim).values.mean()) for dim in (1, 0))
    return 100 * 2 * precision * recall / (precision + recall)


class Factuality:
    """Factual support of a text, by a classifier of (source, sentence) pairs (Tang et al., EMNLP 2024).

    A sentence has the highest probability over parts of the source. The score is the mean over the sentences.

    Raises:
        ValueError: The model cannot be loaded, or has no label for supported sentences.
    """

    def __init__(self, path: str, device: torch.device):
        self.model, self.tokenizer = _load(AutoModelForSequenceClassification, path, "--factuality_model", device)
        self.label, self.device = _supported_label(self.model.config, path), device
        n_special = self.tokenizer.num_special_tokens_to_add(pair=True)
        self.room = _most_tokens(self.model.config, self.tokenizer) - n_special

    def __call__(self, text: str, targets: Sequence[str], source: str) -> dict[str, float | None]:
        """Return the factuality of the text; None if the text has no sentence."""
        # A sentence leaves at least half of the input to the source.
        claims = [part for sentence in sentences(text) for part in self._cut(sentence, self.room // 2)]
        if not claims:
            return {"factuality": None}
        chunks = list(self._chunks(source, self.room - max(map(self._count, claims))))
        pairs = [(chunk, claim) for claim in claims for chunk in chunks]
        probabilities = torch.cat([self._probabilities(batch) for batch in _batches(pairs, BATCH_SIZE)])
        best = probabilities.view(len(claims), len(chunks)).max(dim=1).values
        return {"factuality": 100 * float(best.mean())}

    @torch.no_grad()
    def _probabilities(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        chunks, claims = map(list, zip(*pairs, strict=True))
        inputs = self.tokenizer(chunks, claims, padding=True, return_tensors="pt").to(self.device)
        logits = self.model(**inputs).logits.float()
        return logits[:, 0].sigmoid() if self.label is None else logits.softmax(dim=-1)[:, self.label]

    def _chunks(self, source: str, room: int) -> Iterator[str]:
        """Yield parts of the source of at most `room` tokens. A part ends after a sentence if the sentence fits."""
        chunk = ""
        for part in (part for sentence in sentences(source) for part in self._cut(sentence, room)):
            longer = f"{chunk} {part}" if chunk else part
            if chunk and self._count(longer) > room:
                yield chunk
                longer = part
            chunk = longer
        yield chunk

    def _cut(self, text: str, room: int) -> list[str]:
        """Cut a text in halves until each part has at most `room` tokens, after a space where there is one."""
        if self._count(text) <= room or len(text) < 2:
            return [text]
        middle = text.find(" ", len(text) // 2, -1) + 1 or len(text) // 2
        return [*self._cut(text[:middle].rstrip(), room), *self._cut(text[middle:], room)]

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def load_scorers(bertscore: str | None, layer: int, factuality: str | None, device: torch.device) -> list[Scorer]:
    """Load the scorers whose model is given. Raise ValueError if a model is unusable."""
    scorers: list[Scorer] = [BertScore(bertscore, layer, device)] if bertscore else []
    return scorers + ([Factuality(factuality, device)] if factuality else [])


def _supported_label(config: Any, path: str) -> int | None:
    """Return the index of the label of a supported sentence. None: one logit, whose sigmoid is the probability."""
    if config.num_labels == 1:
        return None
    names = {str(name).casefold(): int(index) for index, name in config.id2label.items()}
    found = [names[name] for name in SUPPORTED if name in names]
    # MiniCheck's labels have no names, and the second one is of supported sentences
    if not found and set(names) != {"label_0", "label_1"}:
        raise ValueError(
            f"--factuality_model {path}: the labels are {', '.join(names)}; one of them must be {', '.join(SUPPORTED)}"
        )
    return found[0] if found else 1


def _load(kind: Any, path: str, flag: str, device: torch.device) -> tuple[Any, Any]:
    try:
        model, about = kind.from_pretrained(path, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(f"{flag} {path}: the model cannot be loaded ({error})") from error
    missing = sorted(name for name in about["missing_keys"] if "pooler" not in name)
    if missing:
        raise ValueError(f"{flag} {path}: the model has no weights for {', '.join(missing[:3])}")
    return model.eval().to(device), tokenizer


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids before and after a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    n_leading = encoded["special_tokens_mask"].index(0)
    n_trailing = encoded["special_tokens_mask"][::-1].index(0)
    ids = encoded["input_ids"]
    return ids[:n_leading], ids[len(ids) - n_trailing :]


def _most_tokens(config: Any, tokenizer: Any) -> int:
    # RoBERTa counts two positions that no token can have.
    positions = getattr(config, "max_position_embeddings", MOST_TOKENS + 2) - 2
    return min(tokenizer.model_max_length, positions)
