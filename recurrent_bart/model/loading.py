"""Loading a plain BART: one line says that the recurrence is new, in place of transformers' table of its weights."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

# names of the parameters that BART does not have
RECURRENCE = ("recurrence.", "memory_gate")
# begins transformers' table of weights that a checkpoint lacks or has in vain
REPORT = "LOAD REPORT"
REPORT_LOGGER = logging.getLogger("transformers.modeling_utils")


def is_recurrence(name: str) -> bool:
    """Return True if a parameter, by its name, belongs to the recurrence."""
    return any(part in name for part in RECURRENCE)


def load_pretrained(model_class: Any, source: str, say: Callable[[str], None], **settings: Any) -> Any:
    """Load a model, and say in one line that its recurrence is new if the checkpoint is a plain BART.

    Args:
        model_class: Class of the model.
        source: Folder or name on the hub.
        say: Called with the line.
        settings: Further arguments of `from_pretrained`.
    """
    with _held_reports() as reports:
        model, info = model_class.from_pretrained(source, output_loading_info=True, **settings)
        is_plain = info["missing_keys"] and all(map(is_recurrence, info["missing_keys"]))
        if is_plain and not info["unexpected_keys"] and not info["mismatched_keys"]:
            reports.clear()
            size = sum(p.numel() for name, p in model.named_parameters() if name in info["missing_keys"])
            say(f"the recurrence ({size / 1e6:.1f} M parameters) is new and untrained: {source} has none")
    return model


@contextlib.contextmanager
def _held_reports() -> Iterator[list[logging.LogRecord]]:
    """Hold transformers' tables back; those that are left in the list at the end, or at an error, are logged."""
    reports: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        is_report = REPORT in record.getMessage()
        if is_report:
            reports.append(record)
        return not is_report

    REPORT_LOGGER.addFilter(hold)
    try:
        yield reports
    finally:
        REPORT_LOGGER.removeFilter(hold)
        for record in reports:
            REPORT_LOGGER.handle(record)
