"""Tokenizers: the pretrained model's tokenizer, or a unigram model trained on the training documents."""

import io
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recurrent_bart.data.tokenizer_files import load_from_files
from recurrent_bart.data.word_segmenter import SETTING, check_installed, segmenter_of, segments_itself

# BART's ids: <s> 0, <pad> 1, </s> 2, <unk> 3.
SPECIAL = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
MASK = "<mask>"
# Maximum number of characters in a line; sentencepiece skips longer lines.
LINE_LENGTH = 1000
# Maximum number of training lines. A larger corpus is sampled, because time and memory grow with the lines.
MAX_LINES = 20_000


def load_tokenizer(
    name_or_path: str,
    trust_remote_code: bool = False,
    source_lang: str | None = None,
    target_lang: str | None = None,
    word_segmenter: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with a model or run, from a folder or the Hugging Face hub.

    If bos and eos are missing, as in BERT's tokenizers, [CLS] and [SEP] take their place. `source_lang` and
    `target_lang` are language codes of documents and targets, for a tokenizer of several languages, as MBart's. They
    are saved with the tokenizer. Without `target_lang`, targets are in the language of the documents. `word_segmenter`
    names the segmenter of Japanese texts and is saved with the tokenizer; None: the saved one.

    Raises:
        ValueError: No tokenizer is found, or the tokenizer needs code that is not trusted, or has no bos, eos or pad
            token; or a language code is missing, unknown, or given for a tokenizer without language codes; or the word
            segmenter is unknown, not installed, or given for a tokenizer that segments words itself.
    """
    tokenizer = _load(name_or_path, trust_remote_code)
    languages = _languages(tokenizer, name_or_path, source_lang, target_lang)
    if languages:
        tokenizer = _load(name_or_path, trust_remote_code, **languages)
    for name, instead in (("bos_token", "cls_token"), ("eos_token", "sep_token")):
        if getattr(tokenizer, name) is None:
            setattr(tokenizer, name, getattr(tokenizer, instead))
    missing = [name for name in ("bos_token", "eos_token", "pad_token") if getattr(tokenizer, name) is None]
    if missing:
        raise ValueError(f"{name_or_path}: the tokenizer has no {', '.join(missing)}")
    _set_segmenter(tokenizer, name_or_path, word_segmenter)
    return tokenizer


def has_languages(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the tokenizer adds language codes to texts."""
    return hasattr(type(tokenizer), "src_lang")


def _languages(
    tokenizer: PreTrainedTokenizerBase, name_or_path: str, source_lang: str | None, target_lang: str | None
) -> dict[str, str]:
    """Return the tokenizer's arguments for its languages, empty without languages."""
    given = {"--source_lang": source_lang, "--target_lang": target_lang}
    if not has_languages(tokenizer):
        for flag, code in given.items():
            if code is not None:
                raise ValueError(f"{flag} {code}: the tokenizer of {name_or_path} adds no language codes; remove it")
        return {}
    codes = sorted(getattr(tokenizer, "lang_code_to_id", {}))
    allowed = f"its codes are {', '.join(codes)}"
    source = source_lang or tokenizer.init_kwargs.get("src_lang")
    target = target_lang or tokenizer.init_kwargs.get("tgt_lang") or source
    if source is None:
        raise ValueError(
            f"{name_or_path}: the tokenizer needs the language of the documents; set --source_lang of launch/train.py, "
            f"or src_lang in tokenizer_config.json; {allowed}"
        )
    for flag, code in (("--source_lang", source), ("--target_lang", target)):
        if code not in codes:
            raise ValueError(f"{flag} {code}: not a language code of the tokenizer of {name_or_path}; {allowed}")
    return {"src_lang": source, "tgt_lang": target}


def _set_segmenter(tokenizer: PreTrainedTokenizerBase, name_or_path: str, word_segmenter: str | None) -> None:
    if word_segmenter not in (None, "none") and segments_itself(tokenizer):
        raise ValueError(f"--word_segmenter {word_segmenter}: the tokenizer of {name_or_path} has its own; remove it")
    check_installed(word_segmenter or segmenter_of(tokenizer))
    if word_segmenter is not None:
        tokenizer.init_kwargs[SETTING] = word_segmenter


def _load(name_or_path: str, trust_remote_code: bool, **languages: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = load_from_files(name_or_path, trust_remote_code, **languages)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name_or_path}: the tokenizer needs Python code from this folder; if you trust the code, add "
                "--trust_remote_code"
            ) from error
        raise ValueError(f"{name_or_path}: no tokenizer could be loaded ({_one_line(error)})") from error
    # If a folder has a model but no tokenizer, Hugging Face returns a tokenizer with special tokens only.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(f"{name_or_path}: no tokenizer could be loaded (its files are missing)")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a sentencepiece unigram model (Kudo 2018, arXiv 1804.10959) as a Hugging Face tokenizer.

    White space becomes one space, characters are normalised to NFKC, and unknown characters become bytes. A corpus of
    more than 20 million characters is sampled for training. A small corpus may give fewer than `vocab_size` ids.

    Raises:
        ValueError: `vocab_size` is too small for bytes and special tokens, or there is no text.
    """
    model, lines = io.BytesIO(), Lines(texts)
    # only training a tokenizer needs this package
    import sentencepiece

    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            input_sentence_size=MAX_LINES,
            shuffle_input_sentence=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            user_defined_symbols=[MASK],
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            bos_piece=SPECIAL["bos"],
            pad_piece=SPECIAL["pad"],
            eos_piece=SPECIAL["eos"],
            unk_piece=SPECIAL["unk"],
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if lines.error:
            raise lines.error from None
        raise ValueError(f"vocab_size={vocab_size}: no tokenizer could be trained ({_one_line(error)})") from error
    return as_hugging_face(model.getvalue())


def as_hugging_face(model: bytes) -> PreTrainedTokenizerFast:
    """Convert a trained sentencepiece model into a tokenizer with BART's special tokens."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=pieces.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_special_tokens(tokenizer)


def with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer with BART's special tokens and ids. The result encodes a text as `<s> text </s>`."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL["bos"],
        pad_token=SPECIAL["pad"],
        eos_token=SPECIAL["eos"],
        unk_token=SPECIAL["unk"],
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after a document, its language code among them."""
    return _around(tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"])


def special_tokens_around_targets(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after a target, its language code among them."""
    plain = tokenizer(text_target="a", add_special_tokens=False)["input_ids"]
    return _around(plain, tokenizer(text_target="a")["input_ids"])


def special_tokens_between(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids between a question and its text: the tokenizer's own between two texts, or eos without them."""
    plain, pair = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a", "a")["input_ids"]
    leading, trailing = special_tokens_around(tokenizer)
    start, end = len(leading) + len(plain), len(pair) - len(trailing) - len(plain)
    return pair[start:end] or [tokenizer.eos_token_id]


def _around(plain: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
    """Return the ids of `whole` before and after `plain`."""
    n_plain = len(plain)
    starts = (start for start in range(len(whole) - n_plain + 1) if whole[start : start + n_plain] == plain)
    start = next(starts, 0)
    return whole[:start], whole[start + n_plain :]


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the tokenizer in the format that `AutoTokenizer` loads."""
    tokenizer.save_pretrained(folder)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class Lines:
    """Iterable of lines short enough for sentencepiece. `error` keeps an exception that sentencepiece would replace."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.texts:
                words = " ".join(unicodedata.normalize("NFKC", text).split())
                for start in range(0, len(words), LINE_LENGTH):
                    yield words[start : start + LINE_LENGTH]
        except Exception as error:
            self.error = error
            raise
