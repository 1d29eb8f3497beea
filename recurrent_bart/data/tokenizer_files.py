"""Tokenizers from their files. transformers rebuilds some tokenizers by class, which loses what their files say."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers, processors
from transformers import AutoTokenizer, MBartTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor
from transformers.utils import cached_file

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
# Names of special tokens in BART's and in BERT's vocabularies.
SPECIAL_NAMES = {
    "bos_token": ("<s>", "[CLS]"),
    "eos_token": ("</s>", "[SEP]"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "pad_token": ("<pad>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
    "mask_token": ("<mask>", "[MASK]"),
}


def load_from_files(name_or_path: str, trust_remote_code: bool, **languages: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub. Where no file names its class, `tokenizer.json` decides alone.

    Raises:
        OSError, ValueError, KeyError, ImportError: No tokenizer can be loaded.
    """
    file = _find(name_or_path, FILE)
    if file is None or _names_class(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **languages)
    else:
        tokenizer = _by_class_or_file(name_or_path, file, **languages)
    _restore_normalizer(tokenizer, file)
    return tokenizer


def _find(name_or_path: str, file: str) -> str | None:
    if Path(name_or_path).exists():
        path = Path(name_or_path) / file
        return str(path) if path.is_file() else None
    missing = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")
    }
    return cached_file(name_or_path, file, **missing)


def _names_class(name_or_path: str) -> bool:
    file = _find(name_or_path, CONFIG)
    saved = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    return "tokenizer_class" in saved or "auto_map" in saved


def _by_class_or_file(name_or_path: str, file: str, **languages: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model's class if it agrees with the file, else the file's."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **languages)
    except (OSError, ValueError, KeyError):
        return _from_file(file)
    is_slow = not isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer if is_slow or _agrees(tokenizer, Tokenizer.from_file(file)) else _from_file(file)


def _agrees(tokenizer: PreTrainedTokenizerFast, saved: Tokenizer) -> bool:
    # the general class knows no special tokens
    if type(tokenizer) is PreTrainedTokenizerFast:
        return False
    codes = getattr(tokenizer, "lang_code_to_id", None)
    if codes:
        return all(saved.token_to_id(code) is not None for code in codes)
    own = tokenizer.backend_tokenizer
    return _kinds(own.model) == _kinds(saved.model) and _kinds(own.pre_tokenizer) == _kinds(saved.pre_tokenizer)


def _kinds(part: Any) -> list[str]:
    """Return the names of the classes of a part of a tokenizer, without settings."""
    return [type(it).__name__ for it in part] if type(part).__name__ == "Sequence" else [type(part).__name__]


def _from_file(file: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a `tokenizer.json`, with the special tokens that its vocabulary has."""
    saved = Tokenizer.from_file(file)
    special = {}
    for name, spellings in SPECIAL_NAMES.items():
        found = next((token for token in spellings if saved.token_to_id(token) is not None), None)
        if found is not None:
            special[name] = found
    first, last = special.get("bos_token"), special.get("eos_token")
    if saved.post_processor is None and first and last:
        ids = [(token, saved.token_to_id(token)) for token in (first, last)]
        saved.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}", pair=f"{first} $A {last} $B {last}", special_tokens=ids
        )
    return PreTrainedTokenizerFast(tokenizer_object=saved, clean_up_tokenization_spaces=False, **special)


def _restore_normalizer(tokenizer: PreTrainedTokenizerBase, file: str | None) -> None:
    """Give MBart's tokenizer the normalizer of its files. Without it, full-width letters are unknown tokens."""
    if not isinstance(tokenizer, MBartTokenizer) or tokenizer.backend_tokenizer.normalizer is not None:
        return
    vocab_file = tokenizer.init_kwargs.get("vocab_file")
    if file is not None:
        found = Tokenizer.from_file(file).normalizer
    elif vocab_file and Path(vocab_file).is_file():
        rules = SentencePieceExtractor(vocab_file).proto.normalizer_spec.precompiled_charsmap
        found = normalizers.Precompiled(rules) if rules else None
    else:
        return
    if found is not None:
        tokenizer.backend_tokenizer.normalizer = found
