"""Identity of a tokenizer: a hash that changes with the ids of a text.

The datasets library takes two seconds to import, so this module, which summaries need, does not import it.
"""

import hashlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recurrent_bart.data.word_segmenter import segmenter_of
from recurrent_bart.files import fingerprint

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
    # Gaps of a text become the mask token, which the backend of a fast tokenizer does not name.
    mask = getattr(tokenizer, "mask_token_id", None)
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        segmenter = segmenter_of(tokenizer)
        return fingerprint(tokenizer.backend_tokenizer.to_str(), mask, *([] if segmenter == "none" else [segmenter]))
    # Hash vocabulary files by content, not by path.
    files = [str(tokenizer.init_kwargs.get(name)) for name in sorted(tokenizer.vocab_files_names)]
    hashes = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if Path(file).is_file()]
    settings = {name: repr(value) for name, value in tokenizer.init_kwargs.items() if _is_setting(name, value)}
    added = sorted((number, repr(token)) for number, token in tokenizer.added_tokens_decoder.items())
    vocabulary = sorted(tokenizer.get_vocab().items())
    return fingerprint(type(tokenizer).__name__, vocabulary, sorted(settings.items()), added, hashes, mask)


def _is_setting(name: str, value: Any) -> bool:
    is_path = name.endswith(("_file", "_path")) or (isinstance(value, str) and Path(value).is_absolute())
    return value is not None and not is_path and name not in NO_SETTINGS and not name.endswith("_token")
