"""Preparation of a run before a model is built. User errors are found here, before a file is written."""

import contextlib
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.batches import Collator, DocumentPlan, SegmentSizes, check_query
from recurrent_bart.data.corpus import draw_documents, load_corpus, texts_of
from recurrent_bart.data.held_out import HeldOut
from recurrent_bart.data.pretraining import PretrainingCollator
from recurrent_bart.data.rows import PRETRAINING_TASKS
from recurrent_bart.data.sources import Source, find_sources
from recurrent_bart.data.text_files import check_encoding
from recurrent_bart.data.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    special_tokens_around,
    special_tokens_around_targets,
    train_tokenizer,
)
from recurrent_bart.data.word_segmenter import segmenter_version
from recurrent_bart.files import atomic_directory, fingerprint
from recurrent_bart.model.generation_settings import longest_text
from recurrent_bart.model.saved_models import check_model_place
from recurrent_bart.monitoring.progress import say
from recurrent_bart.run_folder import RunFolder
from recurrent_bart.training.arguments import Arguments
from recurrent_bart.training.data_arguments import DataArguments
from recurrent_bart.training.environment import Environment, use_bf16, wandb_mode, wandb_settings
from recurrent_bart.training.model_arguments import ModelArguments
from recurrent_bart.training.model_building import build_config
from recurrent_bart.training.resumed_flags import Changes, Flags, changed_flags

# number of skipped documents whose reasons are printed
N_SHOWN = 5
NO_LIMITS: Mapping[str, int | None] = {}
DEFAULT_DEEPSPEED = "zero2"


@dataclass
class Documents:
    """Tokenised documents of one split.

    Attributes:
        corpus: Rows of `load_corpus`.
        plan: Indices and lengths of the documents that are read.
        collator: Function that cuts documents into segments and batches them.
        skipped: One reason per skipped document.
        fingerprint: Hash of the texts.
    """

    corpus: Dataset
    plan: DocumentPlan
    collator: Collator
    skipped: list[str] = field(default_factory=list)
    fingerprint: str = ""

    def targets(self, n_documents: int = 256) -> list[list[int]]:
        """Return the labels of the first `n_documents` documents, one list of ids per target."""
        rows = (self.corpus[index] for index in self.plan.indices[:n_documents])
        return [self.collator.target(summary) for row in rows for summary in row["summaries"] if summary]


@dataclass
class Preparation:
    """Inputs of a run: folder, configurations, tokenizer and documents.

    Attributes:
        flags: Flags as given, by group.
        changes: Changed flags of a resumed run.
        resumes: Step and changed flags of each earlier time that the run was resumed.
    """

    folder: RunFolder
    deepspeed: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    config: RecurrentBartConfig
    splits: dict[str, Documents]
    flags: Flags = field(default_factory=dict)
    changes: Changes = field(default_factory=dict)
    resumes: list[dict[str, Any]] = field(default_factory=list)

    def documents(self) -> dict[str, dict[str, Any]]:
        """Return the number of documents and the fingerprint of each split."""
        return {
            split: {"number": len(documents.corpus), "fingerprint": documents.fingerprint}
            for split, documents in self.splits.items()
        }


def prepare(arguments: Arguments, environment: Environment) -> Preparation:
    """Check all arguments, and load or make the tokenizer and the tokenised documents.

    Raises:
        ValueError: An argument or a document is wrong. The run folder is then unchanged.
    """
    run = arguments.run
    folder = RunFolder(Path(run.output_dir))
    if not run.resume:
        folder.check_new()
    # an unknown mode is refused here, before a file is written
    wandb_mode(arguments.tracking.wandb_mode, wandb_settings())
    # import late: evaluation opens documents without DeepSpeed
    from recurrent_bart.training.zero.deepspeed_config import load_deepspeed_config

    deepspeed = load_deepspeed_config(
        run.deepspeed or DEFAULT_DEEPSPEED,
        run.per_device_train_batch_size,
        run.max_grad_norm,
        use_bf16(run.precision, environment.device),
    )
    saved = folder.tokenizer if run.resume else None
    tokenizer, config, splits = open_splits(arguments.model, arguments.data, saved, run.most_documents())
    if run.tokens_per_batch is not None and run.tokens_per_batch < config.input_size:
        raise ValueError(
            f"--tokens_per_batch {run.tokens_per_batch}: must be at least {config.input_size}, the tokens of a segment"
        )
    flags = asdict(arguments)
    then = folder.read_config() if run.resume else {}
    changes = changed_flags(flags, then) if run.resume else {}
    prepared = Preparation(folder, deepspeed, tokenizer, config, splits, flags, changes, then.get("resumes", []))
    if run.resume:
        check_same_documents(folder, prepared.documents())
    return prepared


def check_same_documents(folder: RunFolder, now: dict[str, dict[str, Any]]) -> None:
    """Check that a resumed run has the documents it began with. Raise ValueError if the documents differ."""
    then = folder.read_config().get("documents")
    if then is None:
        say(f"warning: {folder.config_file} does not record the documents of the run, so they are not compared")
        return
    for split, documents in now.items():
        if documents != then[split]:
            raise ValueError(
                f"--resume {folder.path}: the {split} documents differ from the documents at the start of the run "
                f"({then[split]['number']} then, {documents['number']} now). To train on different documents, start a "
                f"new run with --model_name_or_path {folder.model}"
            )


def open_splits(
    model: ModelArguments, data: DataArguments, saved: Path | None = None, most: Mapping[str, int | None] = NO_LIMITS
) -> tuple[PreTrainedTokenizerBase, RecurrentBartConfig, dict[str, Documents]]:
    """Return the tokenizer, the configuration and the documents for training and validation.

    `saved` is the folder of a saved tokenizer. Without it, the tokenizer is loaded by name, or trained. `most` is the
    largest number of documents of each split.

    Raises:
        ValueError: An argument or a document is wrong.
    """
    sources = find_training_sources(data)
    tokenizer = find_tokenizer(model, data, sources["train"], saved)
    config = build_config(model, tokenizer, data.task)
    splits = {
        split: open_documents(sources[split], data, config, tokenizer, config.max_n_segments, most.get(split))
        for split in ("train", "validation")
    }
    return tokenizer, config, splits


def find_training_sources(data: DataArguments) -> dict[str, Source]:
    """Find the sources of all splits. Raise ValueError if there is no training split."""
    sources = sources_of(data)
    if "train" not in sources:
        raise ValueError(
            f"--dataset {data.dataset}: the data set has no training split; its splits are "
            f"{', '.join(sources) or 'unknown'}"
        )
    return sources | {"train": replace(sources["train"], n_made=data.gap_sentences)}


def sources_of(data: DataArguments) -> dict[str, Source]:
    """Return the source of each split that exists. Print notes about unused data."""
    held_out = HeldOut(data.validation_share, data.held_out_by)
    files = (data.train_file, data.validation_file, data.test_file)
    needs_summary = data.task not in PRETRAINING_TASKS
    sources = find_sources(data.dataset, *files, held_out, data.dataset_config_name or "", needs_summary)
    for note in dict.fromkeys(note for source in sources.values() for note in source.notes):
        say(f"warning: {note}")
    if data.dataset_config_name and not any(source.config_name for source in sources.values()):
        say("warning: --dataset_config_name has no effect: the documents are not from the Hugging Face Hub")
    is_held_out = any(source.held_out for source in sources.values())
    if not is_held_out and (data.group_column or data.validation_share != DataArguments.validation_share):
        say("warning: --group_column and --validation_share have no effect: the data set has a validation split")
    encoding = check_encoding(data.encoding)
    return {
        split: replace(source, skips_bad=data.skip_bad_samples, encoding=encoding) for split, source in sources.items()
    }


def find_tokenizer(
    model: ModelArguments, data: DataArguments, train: Source, saved: Path | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer (saved, named by a flag, or the pretrained model's), or train one and cache it."""
    name = saved or model.tokenizer_name or model.model_name_or_path
    if model.model_name_or_path:
        check_model_place("--model_name_or_path", model.model_name_or_path, may_be_on_hub=True)
    if name:
        languages = data.source_lang, data.target_lang
        return load_tokenizer(str(name), model.trust_remote_code, *languages, data.word_segmenter)
    # copies made with --gap_sentences contain the same words and would not change the tokenizer
    train = replace(train, n_made=0)
    segmenter = data.word_segmenter or "none"
    segmented = [] if segmenter == "none" else [segmenter_version(segmenter)]
    key = fingerprint("unigram", model.vocab_size, train.identity(), data.task, vars(data.columns()), *segmented)
    folder = Path(data.cache_dir).expanduser() / "tokenizers" / key
    if not folder.exists():
        say(f"training a tokenizer of {model.vocab_size} ids on {train.place}")
        texts = texts_of(train.rows(data.task, data.columns()), segmenter)
        with atomic_directory(folder) as draft:
            save_tokenizer(train_tokenizer(texts, model.vocab_size), draft)
    languages = data.source_lang, data.target_lang
    return load_tokenizer(str(folder), False, *languages, data.word_segmenter)


def open_documents(
    source: Source,
    data: DataArguments,
    config: RecurrentBartConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_n_segments: int,
    most: int | None = None,
) -> Documents:
    """Load the tokenised documents of a split, at most `most` of them, and plan how they are cut.

    Raises:
        ValueError: A document is unusable, or no document has a target in its first `max_n_segments` segments.
    """
    found = load_corpus(source, data.task, data.columns(), tokenizer, Path(data.cache_dir).expanduser(), say)
    leading, trailing = special_tokens_around(tokenizer)
    n_special = len(leading) + len(trailing)
    # the draw must not depend on --segment_size, by which questions are too long
    drawn = draw_documents(len(found.rows), most)
    fitting, too_long = check_queries(found.rows, drawn, source, config, n_special)
    corpus, skipped = found.rows.select(fitting), [*found.skipped, *too_long]
    if skipped:
        say(f"warning: {len(skipped)} documents of {source.place} are skipped: {'; '.join(skipped[:N_SHOWN])}")
    sizes = SegmentSizes(config.segment_size, config.input_size, max_n_segments)
    around_targets = special_tokens_around_targets(tokenizer)
    # the target of a denoised segment is the whole segment
    n_asked = config.segment_size + sum(map(len, around_targets)) if data.task == "denoise" else data.max_target_length
    longest = longest_text(config, n_asked)
    common = data.task, sizes, leading, trailing, config.pad_token_id, longest, around_targets
    if data.task in PRETRAINING_TASKS:
        collator: Collator = PretrainingCollator(*common, find_mask(tokenizer, data.task))
    else:
        collator = Collator(*common)
    plan = collator.plan(corpus)
    if not plan.indices:
        remedy = "--segment_size: a text needs two segments" if data.task == "recall" else "--max_n_segments"
        raise ValueError(f"{source.place}: no document has a target in its first {max_n_segments} segments ({remedy})")
    texts = found.fingerprint
    if data.query_column and data.skip_bad_samples and len(drawn) < len(found.rows):
        # earlier versions drew another document in place of a document with a too long question
        texts = fingerprint(texts, fitting)
    return Documents(corpus, plan, collator, skipped, texts)


def check_queries(
    rows: Dataset, indices: Sequence[int], source: Source, config: RecurrentBartConfig, n_special: int
) -> tuple[list[int], list[str]]:
    """Return the indices of documents whose question leaves room for text, and the error of each skipped document.

    Raises:
        ValueError: A question leaves no room and `source` skips no documents, or all documents are skipped.
    """
    assert config.segment_size is not None
    fitting, skipped = list[int](), list[str]()
    chosen = rows.select(indices)
    for index, name, query in zip(indices, chosen["id"], chosen["query"], strict=True):
        place = f"{source.place}: document {name!r}"
        try:
            if query:
                check_query(len(query), config.segment_size - n_special, config.segment_size, place)
            fitting.append(index)
        except ValueError as error:
            if not source.skips_bad:
                raise
            skipped.append(str(error))
    if not fitting:
        raise ValueError(f"{source.place}: no document is left; {len(skipped)} are skipped: {skipped[0]}")
    return fitting, skipped


def find_mask(tokenizer: PreTrainedTokenizerBase, task: str) -> int:
    """Return the id of the mask token. Raise ValueError if the tokenizer has none."""
    found = getattr(tokenizer, "mask_token_id", None)
    if found is None:
        raise ValueError(f"--task {task}: the tokenizer has no mask token, which stands in place of removed text")
    return found


def make_run_folder(arguments: Arguments) -> tuple[RunFolder, list[Path]]:
    """Create the folder of a new run: `--output_dir`, or a unique folder under `runs/`.

    Returns:
        The folder, and the paths that were created, the innermost first.

    Raises:
        ValueError: The folder already holds a run, or cannot be created.
    """
    if arguments.run.output_dir:
        folder = RunFolder(Path(arguments.run.output_dir))
        folder.check_new()
        return folder, folder.create()
    first = Path(default_output_dir(arguments))
    RunFolder(first).check_new()
    for number in itertools.count(1):
        # another run that began in the same second may have this name
        folder = RunFolder(first if number == 1 else first.with_name(f"{first.name}-{number}"))
        with contextlib.suppress(FileExistsError):
            return folder, folder.create(exist_ok=False)
    raise AssertionError("numbers do not end")


def default_output_dir(arguments: Arguments) -> str:
    """Return the name of a new folder under `runs/`: start time, data set, task and model size."""
    data = arguments.data
    name = Path(data.train_file or data.dataset).name.split(".")[0]
    size = Path(arguments.model.model_name_or_path or arguments.model.model_size).name
    return str(Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{data.task}-{size}")
