"""Choice of the next token of each text: the best token, a drawn token, or beam search, all on the device.

A choice does not synchronize, so it runs eagerly and inside a CUDA graph. Results equal Hugging Face's results.
Shape suffixes: B documents, G beams, C candidates of a document, R texts of all documents, T target length,
V vocabulary.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from recurrent_bart.model.decoding.processors import DeviceProcessors

# penalty with which Hugging Face's beam search excludes a candidate
EXCLUDED = -1.0e9


@dataclass(frozen=True)
class SearchSettings:
    """Constants of a search; lengths count the prompt."""

    n_prompt: int
    max_length: int
    eos: tuple[int, ...]
    pad: int | None
    num_beams: int
    is_sampled: bool
    length_penalty: float
    early_stopping: bool | str | None

    @classmethod
    def of(cls, config: GenerationConfig, n_prompt: int) -> "SearchSettings":
        """Read the settings from a configuration that `generate` has prepared."""
        eos, pad = config._eos_token_tensor, config._pad_token_tensor
        return cls(
            n_prompt=n_prompt,
            max_length=config.max_length,
            eos=() if eos is None else tuple(eos.tolist()),
            pad=None if pad is None else int(pad),
            num_beams=config.num_beams or 1,
            is_sampled=bool(config.do_sample),
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
        )


class TokenSearch:
    """Search that writes one text per row, by the best or by a drawn token.

    Attributes:
        ids: `(R, T)`, texts so far.
        position: `(1,)`, index of the last token of each text.
        ancestor: None; see BeamSearch.
        uses_kernels: True if fused kernels choose the best tokens.
    """

    ancestor = None
    uses_kernels = False

    def __init__(self, settings: SearchSettings, process: DeviceProcessors, n_texts: int, n_positions: int):
        self.settings, self.process = settings, process
        device = process.device
        self.ids = torch.zeros(n_texts, n_positions, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.eos = torch.tensor(settings.eos, dtype=torch.long, device=device)
        self.is_unfinished = torch.ones(n_texts, dtype=torch.bool, device=device)
        # number of steps in which a text was unfinished
        self.n_steps = torch.zeros(1, dtype=torch.long, device=device)
        # texts of all rows, and the rows that are left, once finished texts were dropped
        self.dropped: tuple[Tensor, Tensor] | None = None

    @property
    def is_capturable(self) -> bool:
        """True if a CUDA graph can hold `choose`."""
        return self.process.is_capturable

    def key(self) -> Hashable:
        """Return a key of all constants."""
        return type(self), self.settings, self.process.key()

    def state(self) -> list[Tensor]:
        """Return all tensors that a step changes, apart from the cache."""
        return [self.ids, self.position, self.is_unfinished, self.n_steps]

    def begin(self, prompt: Tensor) -> None:
        """Start again with these ids, `(texts, prompt length)`."""
        self.ids.zero_()[:, : prompt.shape[1]].copy_(prompt)
        self.position.fill_(prompt.shape[1] - 1)
        self.is_unfinished.fill_(True)
        self.n_steps.zero_()
        self.dropped = None

    def tokens(self) -> Tensor:
        """Return the last token of each text, `(R,)`."""
        return self.ids.index_select(1, self.position).squeeze(1)

    def mask(self, n_keys: int, is_full: bool, like: Tensor) -> Tensor | None:
        """Return the additive mask of the cached positions; None if all `n_keys` are visible.

        Args:
            n_keys: Number of cached positions.
            is_full: True if the last of these is the current position.
            like: Tensor of the mask's dtype.
        """
        if is_full:
            return None
        is_seen = torch.arange(n_keys, device=self.ids.device) <= self.position
        return like.new_zeros(1, 1, 1, n_keys).masked_fill_(~is_seen, -torch.inf)

    def choose(self, logits_RV: Tensor) -> None:
        """Append a token to each text, the pad token to finished texts, and advance the position."""
        scores_RV = self.process(self.ids, self.position, logits_RV)
        if self.uses_kernels and not self.settings.is_sampled:
            from recurrent_bart.execution.kernels.step_tokens import MOST_TEXTS, append_best

            if len(self.ids) <= MOST_TEXTS:
                changed = self.ids, self.position, self.is_unfinished, self.n_steps
                append_best(scores_RV, *changed, self.eos, self.settings.pad or 0)
                return
        token_R = draw(scores_RV) if self.settings.is_sampled else scores_RV.argmax(dim=-1)
        self.n_steps += self.is_unfinished.any()
        if self.settings.eos:
            assert self.settings.pad is not None
            token_R = token_R.masked_fill(~self.is_unfinished, self.settings.pad)
            self.is_unfinished &= ~is_one_of(token_R, self.eos)
        self.position += 1
        self.ids.index_copy_(1, self.position, token_R.unsqueeze(1))

    def is_done(self) -> bool:
        """Return True if all texts are finished; this waits for the device."""
        return not bool(self.is_unfinished.any())

    def goes_on(self) -> Tensor:
        """Return True for each document whose text is unfinished."""
        return self.is_unfinished

    def keep(self, rows: Tensor) -> None:
        """Keep the documents with these indices alone, and note the texts of the dropped documents."""
        whole, left = self.dropped or (self.ids.clone(), torch.arange(len(self.ids), device=rows.device))
        whole[left] = self.ids
        if self.settings.pad is not None:
            whole[left, int(self.position) + 1 :] = self.settings.pad
        self.dropped = whole, left[rows]
        self.ids, self.is_unfinished = self.ids[rows], self.is_unfinished[rows]

    def texts(self, n_texts: int) -> Tensor:
        """Return the first texts, `(n_texts, longest)`, which end as Hugging Face's do."""
        ids = self.ids
        if self.dropped is not None:
            ids, left = self.dropped
            ids[left] = self.ids
        return ids[:n_texts, : self.settings.n_prompt + int(self.n_steps)].clone()


class BeamSearch:
    """Beam search with Hugging Face's rules: scores, penalties, ends and order of the results.

    The cache is never reordered. `ancestor` names, for each beam and position, the beam whose keys and values belong
    to the beam's text, and the attention mask shows these only.
    """

    def __init__(self, settings: SearchSettings, process: DeviceProcessors, n_documents: int, n_positions: int):
        self.settings, self.process = settings, process
        device, n_beams = process.device, settings.num_beams
        shape = n_documents, n_beams
        self.running = torch.zeros(*shape, n_positions, dtype=torch.long, device=device)
        self.finished = torch.zeros_like(self.running)
        self.ancestor = torch.zeros_like(self.running)
        self.running_scores, self.finished_scores = (torch.zeros(shape, device=device) for _ in range(2))
        self.is_finished = torch.zeros(shape, dtype=torch.bool, device=device)
        # number of generated tokens of finished texts
        self.n_generated = torch.zeros(shape, dtype=torch.long, device=device)
        # True while a running beam of the document may become better than its finished texts
        self.may_improve = torch.ones(n_documents, 1, dtype=torch.bool, device=device)
        self.position, self.is_over = (torch.zeros(1, dtype=kind, device=device) for kind in (torch.long, torch.bool))
        self.beams = torch.arange(n_beams, device=device)
        self.eos = torch.tensor(settings.eos, dtype=torch.long, device=device)
        self.n_candidates = max(2, 1 + len(settings.eos)) * n_beams
        self.is_first = torch.arange(self.n_candidates, device=device) < n_beams
        lengths = torch.arange(n_positions + 1, dtype=torch.double, device=device).clamp(min=1)
        self.penalties = lengths.pow(settings.length_penalty).float()
        # penalty of the longest text, which may be longer than the cache
        longest = torch.tensor(max(1.0, settings.max_length - settings.n_prompt), dtype=torch.double, device=device)
        self.longest_penalty = longest.pow(settings.length_penalty).float()
        # finished texts of all documents with their lengths, and the documents that are left, once some were dropped
        self.dropped: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def is_capturable(self) -> bool:
        """True if a CUDA graph can hold `choose`; drawing several candidates waits for the device."""
        return self.process.is_capturable and not self.settings.is_sampled

    def key(self) -> Hashable:
        """Return a key of all constants."""
        return type(self), self.settings, self.process.key()

    def state(self) -> list[Tensor]:
        """Return all tensors that a step changes, apart from the cache."""
        scores = self.running_scores, self.finished_scores, self.is_finished, self.n_generated, self.may_improve
        return [self.running, self.finished, self.ancestor, *scores, self.position, self.is_over]

    def begin(self, prompt: Tensor) -> None:
        """Start again with these ids, `(documents * beams, prompt length)`; all beams of a document are equal."""
        settings, n_prompt = self.settings, prompt.shape[1]
        # zero counts as missing in Hugging Face's choice of the filling token
        fill = (settings.pad or settings.eos[0]) if settings.eos else -1
        for sequences in (self.running, self.finished):
            sequences.fill_(fill)[:, :, :n_prompt].copy_(prompt.view(*self.running.shape[:2], n_prompt))
        self.ancestor.copy_(self.beams.unsqueeze(1).expand_as(self.ancestor))
        # all beams are equal at first, so only the first one counts
        self.running_scores.fill_(EXCLUDED)[:, 0] = 0.0
        self.finished_scores.fill_(EXCLUDED)
        self.may_improve.fill_(True)
        self.position.fill_(n_prompt - 1)
        for part in (self.is_finished, self.n_generated, self.is_over):
            part.zero_()
        self.dropped = None

    def tokens(self) -> Tensor:
        """Return the last token of each beam, `(R,)`."""
        return self.running.index_select(2, self.position).flatten()

    def mask(self, n_keys: int, is_full: bool, like: Tensor) -> Tensor:
        """Return the additive mask `(B, 1, G, n_keys * G)`, which shows each beam its own text; see TokenSearch."""
        is_past_T = torch.arange(n_keys, device=self.beams.device) <= self.position
        is_own = (self.ancestor[:, :, :n_keys, None] == self.beams) & is_past_T.unsqueeze(1)
        is_own = is_own.flatten(2).unsqueeze(1)
        return like.new_zeros(is_own.shape).masked_fill_(~is_own, -torch.inf)

    def choose(self, logits_RV: Tensor) -> None:
        """Extend the beams by one token, collect finished texts, and advance the position."""
        n_documents, n_beams, _ = self.running.shape
        scores_RV = logits_RV.log_softmax(dim=-1)
        scores_RV = self.process(self.running.flatten(0, 1), self.position, scores_RV)
        scores_BGV = scores_RV.unflatten(0, (n_documents, n_beams)) + self.running_scores.unsqueeze(2)
        score_BC, index_BC = self._candidates(scores_BGV.flatten(1))
        beam_BC, token_BC = index_BC // logits_RV.shape[1], index_BC % logits_RV.shape[1]
        self.position += 1
        text_BCT = _take(self.running, beam_BC).index_copy_(2, self.position, token_BC.unsqueeze(2))
        ends_BC = is_one_of(token_BC, self.eos) | (self.position + 1 >= self.settings.max_length)
        self._collect(text_BCT, score_BC, ends_BC)
        self._continue(text_BCT, score_BC + ends_BC * EXCLUDED, beam_BC)
        self._update_end(ends_BC)

    def _candidates(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        if not self.settings.is_sampled:
            return scores.topk(self.n_candidates)
        drawn_BC = torch.multinomial(scores.softmax(dim=-1), self.n_candidates)
        return scores.gather(1, drawn_BC), drawn_BC

    def _collect(self, text_BCT: Tensor, score_BC: Tensor, ends_BC: Tensor) -> None:
        """Keep the best finished texts; once the search is over, change nothing."""
        settings, n_generated = self.settings, self.position + 1 - self.settings.n_prompt
        ends_BC = ends_BC & self.is_first
        score_BC = score_BC / self.penalties[n_generated]
        if settings.early_stopping is True:
            score_BC = score_BC + self.is_finished.all(dim=-1, keepdim=True) * EXCLUDED
        score_BC = score_BC + ~self.may_improve * EXCLUDED
        score_BC = score_BC + ~ends_BC * EXCLUDED
        merged = torch.cat([self.finished_scores, score_BC], dim=1)
        best_BG = merged.topk(settings.num_beams).indices
        found = [
            (self.finished_scores, merged),
            (self.finished, torch.cat([self.finished, text_BCT], dim=1)),
            (self.is_finished, torch.cat([self.is_finished, ends_BC], dim=1)),
            (self.n_generated, torch.cat([self.n_generated, n_generated.expand_as(ends_BC)], dim=1)),
        ]
        for buffer, candidates in found:
            buffer.copy_(torch.where(self.is_over, buffer, _take(candidates, best_BG)))

    def _continue(self, text_BCT: Tensor, score_BC: Tensor, beam_BC: Tensor) -> None:
        """Continue the best candidates that have not ended."""
        chosen_BG = score_BC.topk(self.settings.num_beams).indices
        self.running.copy_(_take(text_BCT, chosen_BG))
        self.running_scores.copy_(_take(score_BC, chosen_BG))
        self.ancestor.copy_(_take(self.ancestor, _take(beam_BC, chosen_BG)))
        # the next token of a beam writes its own keys and values
        own_BG1 = self.beams.expand_as(chosen_BG).unsqueeze(2)
        self.ancestor.index_copy_(2, self.position, own_BG1)

    def _update_end(self, ends_BC: Tensor) -> None:
        settings = self.settings
        is_longest = settings.early_stopping == "never" and settings.length_penalty > 0.0
        penalty = self.longest_penalty if is_longest else self.penalties[self.position + 1 - settings.n_prompt]
        best_B1 = self.running_scores[:, :1] / penalty
        worst_BG = self.finished_scores.amin(dim=1, keepdim=True).expand_as(self.is_finished)
        worst_BG = worst_BG.masked_fill(~self.is_finished, EXCLUDED)
        self.may_improve &= (best_B1 > worst_BG).any(dim=-1, keepdim=True)
        self.is_over |= ~self.may_improve.any() | ends_BC.all()
        if settings.early_stopping is True:
            self.is_over |= self.is_finished.all()

    def is_done(self) -> bool:
        """Return True if the search is over for all documents; this waits for the device."""
        return bool(self.is_over)

    def goes_on(self) -> Tensor:
        """Return True for each document whose finished texts may still change."""
        if self.settings.early_stopping is True:
            return self.may_improve.squeeze(1) & ~self.is_finished.all(dim=1)
        return self.may_improve.squeeze(1)

    def keep(self, rows: Tensor) -> None:
        """Keep the documents with these indices alone, and note the texts of the dropped documents."""
        texts, lengths, left = self._noted()
        self.dropped = texts, lengths, left[rows]
        self.running, self.finished, self.ancestor = (
            part[rows] for part in (self.running, self.finished, self.ancestor)
        )
        self.running_scores, self.finished_scores = self.running_scores[rows], self.finished_scores[rows]
        self.is_finished, self.n_generated = self.is_finished[rows], self.n_generated[rows]
        self.may_improve = self.may_improve[rows]

    def _noted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the finished texts of all documents, their lengths, and the documents that are left."""
        if self.dropped is None:
            everything = torch.arange(len(self.finished), device=self.beams.device)
            return self.finished.clone(), self.n_generated.clone(), everything
        texts, lengths, left = self.dropped
        texts[left], lengths[left] = self.finished, self.n_generated
        return texts, lengths, left

    def texts(self, n_documents: int, n_per_document: int) -> Tensor:
        """Return the best texts of the first documents, `(n_documents * n_per_document, longest)`."""
        found, lengths, _ = self._noted()
        n_generated = int(lengths[:n_documents, :n_per_document].max())
        texts = found[:n_documents, :n_per_document, : self.settings.n_prompt + n_generated]
        return texts.flatten(0, 1).clone()


def draw(scores_RV: Tensor) -> Tensor:
    """Draw a token per text, the same as `torch.multinomial` draws.

    On a GPU, `torch.multinomial` waits for the device to check the probabilities, which a CUDA graph cannot hold.
    """
    probability_RV = nn.functional.softmax(scores_RV, dim=-1)
    if scores_RV.device.type == "cpu":
        return torch.multinomial(probability_RV, num_samples=1).squeeze(1)
    return draw_unchecked(probability_RV)


def draw_unchecked(probability_RV: Tensor) -> Tensor:
    """Draw a token per text without a check of the probabilities."""
    return (probability_RV / torch.empty_like(probability_RV).exponential_()).argmax(dim=-1)


def is_one_of(tokens: Tensor, eos: Tensor) -> Tensor:
    """Return True at end tokens."""
    return (tokens.unsqueeze(-1) == eos).any(dim=-1)


def _take(whole: Tensor, index: Tensor) -> Tensor:
    """Select along dimension 1 per document."""
    index = index.view(*index.shape, *[1] * (whole.dim() - 2))
    return whole.gather(1, index.expand(*index.shape[:2], *whole.shape[2:]))


def build_search(
    settings: SearchSettings, process: DeviceProcessors, n_rows: int, n_positions: int
) -> TokenSearch | BeamSearch:
    """Build the search for `n_rows` rows of ids."""
    if settings.num_beams == 1:
        return TokenSearch(settings, process, n_rows, n_positions)
    return BeamSearch(settings, process, n_rows // settings.num_beams, n_positions)
