"""Recurrent BART: fine-tune BART on documents of any length."""

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.model.modeling_pretrained import RecurrentBartPreTrainedModel
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration, RecurrentBartModel
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState

__all__ = [
    "RecurrentBartConfig",
    "RecurrentBartForConditionalGeneration",
    "RecurrentBartModel",
    "RecurrentBartPreTrainedModel",
    "RecurrentState",
]
__version__ = "0.1.0"
