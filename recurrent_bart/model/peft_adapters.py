"""Defaults for PEFT, which knows BART but not the recurrence.

PEFT saves adapters only. A checkpoint of plain BART holds no recurrence, so it is saved with the adapters.
"""

import copy
import sys
from typing import Any

from torch import nn
from transformers.utils import logging

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.model.decoder_attention import GatedCrossAttention
from recurrent_bart.recurrence.prefix_recurrence import PrefixRecurrence

RECURRENCE = "recurrence"
# prefix of the names of PEFT's tables, one per kind of adapter: default target modules of each model type
TABLES = "TRANSFORMERS_MODELS_TO_"
logger = logging.get_logger(__name__)


def use_barts_targets() -> None:
    """Give Recurrent BART the default target modules of BART in every table of PEFT, if PEFT is imported."""
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants else ():
        if name.startswith(TABLES) and isinstance(table, dict) and "bart" in table:
            table.setdefault(RecurrentBartConfig.model_type, table["bart"])


def save_recurrence(model: nn.Module, configs: dict[str, Any]) -> None:
    """Train the recurrence and save it with each adapter, unless the adapter's `modules_to_save` is an empty list."""
    if not any(isinstance(module, PrefixRecurrence) for module in model.modules()):
        return
    for adapter, config in configs.items():
        if _is_saved(model, adapter):
            continue
        if getattr(config, "modules_to_save", []) == []:
            logger.warning(
                f"PEFT adapter {adapter!r}: the recurrence is not trained and is not saved with the adapter. Each "
                "conversion of BART draws new weights for the recurrence, and logits change. "
                f'modules_to_save=["{RECURRENCE}"] saves the recurrence'
            )
            continue
        _train(model, adapter, config)
        if any(isinstance(module, GatedCrossAttention) for module in model.modules()):
            logger.warning(
                f'PEFT adapter {adapter!r}: with prefix_attention="gated", memory_gate of the decoder is not trained; '
                'the gate stays closed after a conversion of BART. prefix_attention="concat" has no memory_gate'
            )


def _is_saved(model: nn.Module, adapter: str) -> bool:
    return any(
        isinstance(module, PrefixRecurrence) and f".modules_to_save.{adapter}" in f".{name}"
        for name, module in model.named_modules()
    )


def _train(model: nn.Module, adapter: str, config: Any) -> None:
    """Repeat for the recurrence what PEFT does with `modules_to_save` before it adds adapters."""
    from peft.utils.other import set_additional_trainable_modules

    config.modules_to_save = [*(config.modules_to_save or ()), RECURRENCE]
    alone = copy.copy(config)
    alone.modules_to_save = [RECURRENCE]
    # PEFT has already handled these two
    alone.trainable_token_indices = alone.modules_to_tie = None
    set_additional_trainable_modules(model, alone, {}, adapter)
