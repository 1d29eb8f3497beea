"""LED model that has the size of a RecurrentBart model and uses the same batches and the same loss.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length, V vocabulary.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartPreTrainedModel, GenerationConfig, LEDConfig, LEDForConditionalGeneration
from transformers.modeling_outputs import Seq2SeqLMOutput

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.model.loss import token_loss
from recurrent_bart.studies.documents.peers import BART_OFFSET, repeat_rows

# fields that the configurations of BART and LED share
SIDES = [f"{side}_{name}" for side in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")]
IDS = ["bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"]
SHARED = [
    "vocab_size",
    "d_model",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "activation_function",
    "init_std",
    *SIDES,
    *IDS,
]

# parts of LED's parameter names and of BART's
RENAMED = {
    "led.": "model.",
    "_global.": ".",
    "longformer_self_attn.query": "q_proj",
    "longformer_self_attn.key": "k_proj",
    "longformer_self_attn.value": "v_proj",
    "self_attn.output.": "self_attn.out_proj.",
}


def bart_name(name: str) -> str:
    """Return the name in BART of one of LED's parameters."""
    for own, barts in RENAMED.items():
        name = name.replace(own, barts)
    return name


class WholeDocumentLed(nn.Module):
    """LED (arXiv 2004.05150) with the size of a RecurrentBart model. A batch has one long segment per document.

    The first token has global attention, as the LED authors recommend for summaries. A token attends to `window`
    tokens, half of them on either side. Segments of 512 tokens give the published 1,024. `n_tokens` is the maximum
    document length.
    """

    def __init__(self, config: RecurrentBartConfig, n_tokens: int, window: int):
        super().__init__()
        fields = {name: getattr(config, name) for name in SHARED}
        self.led = LEDForConditionalGeneration(
            LEDConfig(
                **fields,
                attention_window=[window] * config.encoder_layers,
                # documents are padded to whole windows
                max_encoder_position_embeddings=-(-n_tokens // window) * window,
                max_decoder_position_embeddings=config.max_position_embeddings,
            )
        )

    @property
    def generation_config(self) -> GenerationConfig:
        """Generation settings of the model."""
        return self.led.generation_config

    @torch.no_grad()
    def copy_weights(self, bart: BartPreTrainedModel) -> None:
        """Copy the weights of a BART of the same size, as the authors of LED did with BART-large.

        BART's encoder positions are repeated. The attention of the first token over all tokens starts with the weights
        of the attention within the window. Generation settings are copied too.

        Raises:
            ValueError: The model has MBart's layers or scaled embeddings, which LED has not.
        """
        if getattr(bart.config, "normalize_before", False) or bart.config.scale_embedding:
            raise ValueError(
                "LED has BART's layers, so the weights of a model with MBart's layers or scaled embeddings do not fit"
            )
        self.led.generation_config = copy.deepcopy(bart.generation_config)
        weights = bart.state_dict()
        copied = {name: weights[bart_name(name)] for name in self.led.state_dict()}
        for name in copied:
            if name.endswith("embed_positions.weight"):
                n_rows = len(self.led.get_parameter(name))
                copied[name] = repeat_rows(copied[name][BART_OFFSET:], n_rows)
        self.led.load_state_dict(copied)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_items_in_batch: int | None = None,
        return_logits: bool = True,
    ) -> Seq2SeqLMOutput:
        """Return loss and logits, as RecurrentBartForConditionalGeneration does."""
        labels_BT = labels.to(input_ids.device)
        inputs = {"decoder_input_ids": self.led.prepare_decoder_input_ids_from_labels(labels_BT), "use_cache": False}
        logits_BTV = self.led(**self._document(input_ids, attention_mask), **inputs).logits
        loss = token_loss(logits_BTV, labels_BT, num_items_in_batch)
        return Seq2SeqLMOutput(loss=loss, logits=logits_BTV if return_logits else None)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **how: Any) -> Tensor:
        """Return generated ids `(B, T)`."""
        return self.led.generate(**self._document(input_ids, attention_mask), **how)

    def _document(self, input_ids_BNL: Tensor, mask_BNL: Tensor) -> dict[str, Tensor]:
        ids_BL = input_ids_BNL.squeeze(1)
        sees_all_BL = torch.zeros_like(ids_BL)
        sees_all_BL[:, 0] = 1
        mask_BL = mask_BNL.squeeze(1).to(ids_BL.device)
        return {"input_ids": ids_BL, "attention_mask": mask_BL, "global_attention_mask": sees_all_BL}
