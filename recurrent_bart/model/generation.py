"""Generation of texts from documents and states, after the last segment or after several segments.

Shape suffixes: B documents, n tokens of an uncut document, N segments, L tokens in a segment, M target segments (a text
is generated after each), m target segments that are decoded in one call, S sequences per text, T target length.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import ModelOutput

from recurrent_bart.model.decoding.fast_generation import generate_fast
from recurrent_bart.model.modeling_outputs import RecurrentEncoderOutput
from recurrent_bart.recurrence.segmented_batch import read_selection

# kinds of search that the fast loop has
OWN_MODES = (
    *(GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
    *(GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE),
)


class SegmentGeneration(GenerationMixin):
    """GenerationMixin for documents of any length, with a `state` and with texts after several segments."""

    # set by the model class that inherits this one
    model: Any

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        decode_at: str = "last_segment",
        target_segments: Tensor | None = None,
        may_pack: bool = False,
        fast: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate texts from documents that are cut into segments `(B, N, L)`, or from uncut documents `(B, n)`.

        See GenerationMixin for the other arguments.

        Args:
            decode_at: `"last_segment"`: generate a text after the last segment. `"every_segment"`: after each segment.
            target_segments: `(B, N)` booleans: generate a text after each True segment that exists instead; see
                RecurrentBartEncoder.
            may_pack: If contexts differ much in length, generate from groups of similar length instead of padding all
                to the longest. The ids are the same unless they are sampled. Ignored with `return_dict_in_generate` or
                `decoder_input_ids`. Do not use where all ranks must call the model equally often.
            fast: False: run Hugging Face's loop over tokens instead of this package's, see `model/decoding/README.md`.
                The default is `generation_config.fast` if it is set, else True.

        Returns:
            Ids `(B, T)`, or `(B, N, T)` after every segment or after target segments, filled with the pad id where
            there is no text. With `num_return_sequences=S` there are `B * S` rows; a document's rows are adjacent. With
            `return_dict_in_generate` these ids are `sequences`; the other fields have one row per text.

        Raises:
            ValueError: No target segment exists, a document has neither text nor a state, or `encoder_outputs` were
                computed for other segments.
        """
        decode_at, target_segments = read_selection(kwargs, decode_at, target_segments)
        if callable(kwargs.get("custom_generate")):
            fast = False
        if fast is not None:
            kwargs["fast"] = fast
        input_ids = kwargs.pop("input_ids", inputs)
        encoded = kwargs.pop("encoder_outputs", None)
        if encoded is not None:
            encoded = RecurrentEncoderOutput.of(encoded, self.config, kwargs.get("attention_mask"))
        else:
            gives_more = self._setting("return_dict_in_generate", generation_config, kwargs)
            takes_more = kwargs.get("decoder_input_ids") is not None
            kwargs["may_pack"] = may_pack and target_segments is not None and not gives_more and not takes_more
            # target segments without text get no generated text
            is_decoded = target_segments is None
            selected = {"decode_at": decode_at, "target_segments": target_segments, "is_decoded": is_decoded}
            encoded = self._read_to_generate(input_ids, selected, generation_config, kwargs)
        chosen = encoded.check_contexts(decode_at, target_segments, self.config)
        if chosen is not None:
            return self._generate_segments(encoded, chosen, generation_config, **kwargs)
        is_flat = input_ids is not None and input_ids.dim() == 2
        # GenerationMixin takes an output's `state` for a cache
        stateless = dataclasses.replace(encoded, state=None)
        # the encoder has already run, but GenerationMixin may inspect flat ids
        return super().generate(input_ids if is_flat else None, generation_config, encoder_outputs=stateless, **kwargs)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, fast: bool | None = None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict]:
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if fast is not None:
            prepared.fast = fast
        return prepared, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, generation_mode: GenerationMode, *sizes: int
    ) -> Any:
        """Leave Hugging Face's cache to its own loop: the fast loop has other buffers."""
        has_cache = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation
        prepare = super()._prepare_cache_for_generation
        is_slow = getattr(generation_config, "fast", None) is False
        if has_cache or is_slow or generation_mode not in OWN_MODES:
            return prepare(generation_config, model_kwargs, generation_mode, *sizes)
        # `_sample` and `_beam_search` get it
        model_kwargs["make_cache"] = lambda kwargs: prepare(generation_config, kwargs, generation_mode, *sizes)
        return None

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        return self._search(super()._sample, *args, **kwargs)

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        return self._search(super()._beam_search, *args, **kwargs)

    def _search(self, slow: Callable[..., Any], *args: Any, make_cache: Any = None, **kwargs: Any) -> Any:
        """Run the fast loop, or Hugging Face's loop `slow` with its cache."""
        ids = generate_fast(self, *args, **kwargs)
        if ids is not None:
            return ids
        if make_cache is not None:
            make_cache(kwargs)
        return slow(*args, **kwargs)

    def _read_to_generate(
        self,
        input_ids: Tensor | None,
        selected: dict[str, Any],
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> RecurrentEncoderOutput:
        """Run the encoder as `forward` does, and remove the encoder's arguments from `kwargs`."""
        reading = {name: kwargs.pop(name, None) for name in ("attention_mask", "inputs_embeds", "state", "may_pack")}
        for name in ("output_attentions", "output_hidden_states"):
            # these stay in kwargs, because the decoder gets them too
            reading[name] = self._setting(name, generation_config, kwargs)
        pad_token_id = self.config.pad_token_id
        if reading["attention_mask"] is None and input_ids is not None and (input_ids == pad_token_id).any():
            reading["attention_mask"] = input_ids.ne(pad_token_id).long()
        return self.model.encode(input_ids, **selected, **reading)

    def _setting(self, name: str, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> Any:
        return kwargs.get(name, getattr(generation_config or self.generation_config, name))

    def _generate_segments(
        self,
        encoded: RecurrentEncoderOutput,
        target_segments_BN: Tensor,
        generation_config: GenerationConfig | None,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        is_read_BN = encoded.is_read
        assert is_read_BN is not None
        has_text_BN = is_read_BN & target_segments_BN
        if not has_text_BN.any():
            raise ValueError("target_segments: the selected segments hold no text in any document")
        if encoded.packing is not None:
            generated = self._generate_groups(
                encoded, is_read_BN[target_segments_BN].cpu(), generation_config, **kwargs
            )
        else:
            # contexts of the target segments alone have 3 dimensions, contexts after every segment have 4
            is_rows = encoded.last_hidden_state.dim() == 3
            is_shown = is_read_BN[target_segments_BN].nonzero().squeeze(1) if is_rows else has_text_BN
            generated = super().generate(None, generation_config, encoder_outputs=encoded.rows(is_shown), **kwargs)
        texts = generated.sequences if isinstance(generated, ModelOutput) else generated
        # num_return_sequences texts per segment
        texts_MST = texts.unflatten(0, (int(has_text_BN.sum()), -1))
        texts_BNST = texts.new_full((*has_text_BN.shape, *texts_MST.shape[1:]), self.config.pad_token_id)
        texts_BNST[has_text_BN] = texts_MST
        texts = texts_BNST.transpose(1, 2).flatten(0, 1)
        if not isinstance(generated, ModelOutput):
            return texts
        generated.sequences = texts
        return generated

    def _generate_groups(
        self,
        encoded: RecurrentEncoderOutput,
        is_read_M: Tensor,
        generation_config: GenerationConfig | None,
        **kwargs: Any,
    ) -> Tensor:
        """Generate ids `(M * S, T)` from packed contexts, in the order of the target segments."""
        parts, numbers = [], []
        for group, number_m in encoded.groups():
            has_text_m = is_read_M[number_m]
            if has_text_m.any():
                rows = group.rows(has_text_m)
                parts.append(super().generate(None, generation_config, encoder_outputs=rows, **kwargs))
                numbers.append(number_m[has_text_m])
        most, pad = max(part.shape[1] for part in parts), self.config.pad_token_id
        texts_MST = torch.cat(
            [
                nn.functional.pad(part, (0, most - part.shape[1]), value=pad).unflatten(0, (len(number_m), -1))
                for part, number_m in zip(parts, numbers, strict=True)
            ]
        )
        return texts_MST[torch.cat(numbers).argsort()].flatten(0, 1)
