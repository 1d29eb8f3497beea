"""Recurrent BART: fine-tune BART on documents of any length."""

import importlib
from typing import TYPE_CHECKING, Any

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
    "Summarizer",
]
__version__ = "0.1.0"
# imported at first use, because a training script needs none of them
LATER = {"Summarizer": "recurrent_bart.inference.summarizer"}

if TYPE_CHECKING:
    from recurrent_bart.inference.summarizer import Summarizer


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LATER[name]), name)
