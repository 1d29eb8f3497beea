"""Recurrent BART from the installed package; `from_pretrained(FOLDER, trust_remote_code=True)` loads this file.

`save_pretrained` copies this file beside the weights.
"""

try:
    from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
    from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration, RecurrentBartModel
except ImportError as error:
    raise ImportError(
        "this model needs the package recurrent-bart: install its wheel, or run `pip install .` in its checkout"
    ) from error

__all__ = ["RecurrentBartConfig", "RecurrentBartForConditionalGeneration", "RecurrentBartModel"]
