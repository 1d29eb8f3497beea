"""Loading of models; for a plain BART, one line about the new recurrence replaces transformers' table of weights."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

# parts of the names of parameters that BART does not have
RECURRENCE = ("recurrence.", "memory_gate")
# title of transformers' table of missing and unexpected weights
REPORT = "LOAD REPORT"
REPORT_LOGGER = logging.getLogger("transformers.modeling_utils")


def is_recurrence(name: str) -> bool:
    """Return True if the parameter named `name` belongs to the recurrence."""
    return any(part in name for part in RECURRENCE)


def load_pretrained(model_class: Any, source: str, say: Callable[[str], None], **settings: Any) -> Any:
    """Load a model from a folder or the hub; pass one line to `say` if the checkpoint is a plain BART."""
    with _held_reports() as reports:
        model, info = model_class.from_pretrained(source, output_loading_info=True, **settings)
        is_plain = info["missing_keys"] and all(map(is_recurrence, info["missing_keys"]))
        if is_plain and not info["unexpected_keys"] and not info["mismatched_keys"]:
            reports.clear()
            size = sum(p.numel() for name, p in model.named_parameters() if name in info["missing_keys"])
            say(f"the recurrence ({size / 1e6:.1f} M parameters) is new and untrained; {source} has no recurrence")
    return model


@contextlib.contextmanager
def _held_reports() -> Iterator[list[logging.LogRecord]]:
    """Collect transformers' tables of weights in a list; at the end, log the tables that are still in the list."""
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
