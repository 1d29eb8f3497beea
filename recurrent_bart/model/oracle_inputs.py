"""Decoder passes that predict the tokens that an oracle puts into the decoder inputs; see `scheduled_sampling`.

Shape suffixes: B documents, M = documents * beams, T target length.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recurrent_bart.model.modeling_outputs import RecurrentEncoderOutput
from recurrent_bart.model.scheduled_sampling import (
    Oracle,
    SpecialIds,
    caching,
    mix_inputs,
    sentence_oracle,
    word_oracle,
)


class OracleInputs:
    """Methods of a model that replace decoder inputs by an oracle's tokens."""

    # set by the model class that inherits this one
    config: Any
    model: Any
    _logits: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def _mixed_inputs(
        self, oracle: Oracle, encoded: RecurrentEncoderOutput, inputs_BT: Tensor, labels_BT: Tensor
    ) -> Tensor:
        """Replace some decoder inputs by an oracle's tokens; the encoder is not run again."""
        # return early, so that no random number is drawn
        if oracle.gold_probability == 1:
            return inputs_BT
        eos, pad = self.config.eos_token_id, self.config.pad_token_id
        start = self.config.decoder_start_token_id
        special = SpecialIds(eos, pad, outside=(eos, pad, *([] if start is None else [start])))
        if oracle.kind == "word":
            decoded = self.model.decode(encoded, input_ids=inputs_BT, use_cache=False)
            words_BT = word_oracle(self._logits(decoded.last_hidden_state), oracle.temperature, special)
        else:
            with caching(self.model.decoder):
                next_logits = self._next_logits(encoded, oracle.n_beams)
                words_BT = sentence_oracle(next_logits, inputs_BT, labels_BT, oracle, special)
        mixed_BT = mix_inputs(inputs_BT, words_BT, labels_BT, oracle.gold_probability)
        # a language code may follow the end
        return torch.where(inputs_BT == eos, inputs_BT, mixed_BT)

    def _next_logits(self, encoded: RecurrentEncoderOutput, n_beams: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a beam-search step: a function from each beam's last id and parent beam to the next id's scores."""
        n_rows, device = len(encoded.last_hidden_state), encoded.last_hidden_state.device
        read = encoded.rows(torch.arange(n_rows, device=device).repeat_interleave(n_beams))
        cache = None

        def next_logits(ids_M: Tensor, parents_M: Tensor) -> Tensor:
            nonlocal cache
            if cache is not None:
                # beams move only within a document, so the cross-attention cache stays valid
                cache.self_attention_cache.reorder_cache(parents_M)
            decoded = self.model.decode(read, input_ids=ids_M.unsqueeze(1), past_key_values=cache, use_cache=True)
            cache = decoded.past_key_values
            return self._logits(decoded.last_hidden_state[:, -1])

        return next_logits
