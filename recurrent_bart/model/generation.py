"""Generation from documents and states, after the last segment or after each.

Shape suffixes: B documents, N segments, M chosen segments, m of them in a group, S sequences returned of each, T target
length.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import ModelOutput

from recurrent_bart.model.modeling_outputs import RecurrentEncoderOutput


class SegmentGeneration(GenerationMixin):
    """Identical to GenerationMixin except: documents of any length, `state`, texts after each segment."""

    # of the model that this is a part of
    model: Any

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        every_segment: bool | Tensor = False,
        may_pack: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As GenerationMixin's, also of documents `(B, N, L)`, from a `state`, and after each segment or chosen ones.

        Args:
            inputs: See GenerationMixin, for `generation_config` and the others too.
            generation_config: Likewise.
            every_segment: True: a text after each segment. `(B, N)` booleans: after those of the segments that are
                read; see RecurrentBartEncoder.
            may_pack: Where chosen segments show contexts of very different lengths, generate from those of similar
                length, then from others, instead of padding all to the longest. The ids are the same unless they are
                drawn. Not where more than ids is wanted or `decoder_input_ids` are given, nor for processes that
                must call the model equally often.

        Returns:
            Ids `(B, T)`, or after segments `(B, N, T)`, pad where there is no text. With `num_return_sequences`, a
            document's texts stand one behind the other, so there are more rows. With `return_dict_in_generate`, these
            are the `sequences`; of all else after segments there is a row for each text, document by document.

        Raises:
            ValueError: No segment that is read is chosen, or `encoder_outputs` are given and have other contexts than
                are decoded here.
        """
        chosen = every_segment if isinstance(every_segment, Tensor) else None
        input_ids = kwargs.pop("input_ids", inputs)
        encoded = kwargs.pop("encoder_outputs", None)
        if encoded is not None:
            encoded = RecurrentEncoderOutput.of(encoded, self.config, kwargs.get("attention_mask"))
        else:
            gives_more = self._setting("return_dict_in_generate", generation_config, kwargs)
            takes_more = kwargs.get("decoder_input_ids") is not None
            kwargs["may_pack"] = may_pack and chosen is not None and not gives_more and not takes_more
            encoded = self._read_to_generate(input_ids, every_segment, generation_config, kwargs)
        if chosen is not None or every_segment:
            return self._generate_segments(encoded, chosen, generation_config, **kwargs)
        encoded.check_one_context()
        is_flat = input_ids is not None and input_ids.dim() == 2
        # GenerationMixin takes what outputs call `state` for a cache
        stateless = dataclasses.replace(encoded, state=None)
        # the encoder is done with them, but GenerationMixin may look at flat ids
        return super().generate(input_ids if is_flat else None, generation_config, encoder_outputs=stateless, **kwargs)

    def _read_to_generate(
        self,
        input_ids: Tensor | None,
        every_segment: bool | Tensor,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> RecurrentEncoderOutput:
        """Run the encoder as `forward` does, which `GenerationMixin` would call on its own; takes its arguments."""
        reading = {name: kwargs.pop(name, None) for name in ("attention_mask", "inputs_embeds", "state", "may_pack")}
        for name in ("output_attentions", "output_hidden_states"):
            # the decoder is asked for them too
            reading[name] = self._setting(name, generation_config, kwargs)
        pad_token_id = self.config.pad_token_id
        if reading["attention_mask"] is None and input_ids is not None and (input_ids == pad_token_id).any():
            reading["attention_mask"] = input_ids.ne(pad_token_id).long()
        return self.model.encode(input_ids, every_segment=every_segment, **reading)

    def _setting(self, name: str, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> Any:
        return kwargs.get(name, getattr(generation_config or self.generation_config, name))

    def _generate_segments(
        self,
        encoded: RecurrentEncoderOutput,
        chosen_BN: Tensor | None,
        generation_config: GenerationConfig | None,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        chosen_BN, is_read_BN = encoded.check_contexts(chosen_BN), encoded.is_read
        assert is_read_BN is not None
        is_told_BN = is_read_BN & chosen_BN
        if not is_told_BN.any():
            raise ValueError("every_segment: no segment that is read is chosen")
        if encoded.packing is not None:
            found = self._generate_groups(encoded, is_read_BN[chosen_BN].cpu(), generation_config, **kwargs)
        else:
            # there are rows of all that is chosen, or contexts of everything
            is_rows = encoded.last_hidden_state.dim() == 3
            is_shown = is_read_BN[chosen_BN].nonzero().squeeze(1) if is_rows else is_told_BN
            found = super().generate(None, generation_config, encoder_outputs=encoded.rows(is_shown), **kwargs)
        texts = found.sequences if isinstance(found, ModelOutput) else found
        # of each segment, as many texts as num_return_sequences says
        texts_MST = texts.unflatten(0, (int(is_told_BN.sum()), -1))
        texts_BNST = texts.new_full((*is_told_BN.shape, *texts_MST.shape[1:]), self.config.pad_token_id)
        texts_BNST[is_told_BN] = texts_MST
        texts = texts_BNST.transpose(1, 2).flatten(0, 1)
        if not isinstance(found, ModelOutput):
            return texts
        found.sequences = texts
        return found

    def _generate_groups(
        self,
        encoded: RecurrentEncoderOutput,
        is_read_M: Tensor,
        generation_config: GenerationConfig | None,
        **kwargs: Any,
    ) -> Tensor:
        """Ids `(M * S, T)` from contexts that are packed, of those that are read, in the order of marks."""
        parts, numbers = [], []
        for group, number_m in encoded.groups():
            is_told_m = is_read_M[number_m]
            if is_told_m.any():
                rows = group.rows(is_told_m)
                parts.append(super().generate(None, generation_config, encoder_outputs=rows, **kwargs))
                numbers.append(number_m[is_told_m])
        most, pad = max(part.shape[1] for part in parts), self.config.pad_token_id
        texts_MST = torch.cat(
            [
                nn.functional.pad(part, (0, most - part.shape[1]), value=pad).unflatten(0, (len(number_m), -1))
                for part, number_m in zip(parts, numbers, strict=True)
            ]
        )
        return texts_MST[torch.cat(numbers).argsort()].flatten(0, 1)
