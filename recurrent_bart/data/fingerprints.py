"""Fingerprints of values and of tokenizers.

The datasets library takes two seconds to import, so this module, which summaries need, does not import it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Arguments of slow tokenizers that do not change the ids of a text.
NO_SETTINGS = {
    "added_tokens_decoder",
    "additional_special_tokens",
    "auto_map",
    "backend",
    "extra_special_tokens",
    "is_local",
    "local_files_only",
    "model_max_length",
    "name_or_path",
    "padding_side",
    "processor_class",
    "tokenizer_class",
    "truncation_side",
    "trust_remote_code",
}


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all settings that decide the ids of a text. The tokenizer's path does not change the hash."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return fingerprint(tokenizer.backend_tokenizer.to_str())
    # Hash vocabulary files by content, not by path.
    files = [str(tokenizer.init_kwargs.get(name)) for name in sorted(tokenizer.vocab_files_names)]
    hashes = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if Path(file).is_file()]
    settings = {name: repr(value) for name, value in tokenizer.init_kwargs.items() if _is_setting(name, value)}
    added = sorted((number, repr(token)) for number, token in tokenizer.added_tokens_decoder.items())
    vocabulary = sorted(tokenizer.get_vocab().items())
    return fingerprint(type(tokenizer).__name__, vocabulary, sorted(settings.items()), added, hashes)


def _is_setting(name: str, value: Any) -> bool:
    is_path = name.endswith(("_file", "_path")) or (isinstance(value, str) and Path(value).is_absolute())
    return value is not None and not is_path and name not in NO_SETTINGS and not name.endswith("_token")


def fingerprint(*parts: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of JSON-serialisable values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
