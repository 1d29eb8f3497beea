"""Flags of the documents."""

from dataclasses import dataclass
from typing import Any, ClassVar

from recurrent_bart.data.held_out import SPLIT_RULES
from recurrent_bart.data.rows import PRETRAINING_TASKS, TASKS, Columns
from recurrent_bart.data.text_files import check_encoding
from recurrent_bart.data.word_segmenter import check_installed
from recurrent_bart.model.generation_settings import MAX_TARGET_LENGTH
from recurrent_bart.training.argument_fields import check_at_least, check_choice, check_given, flag

# Flags that pretraining tasks cannot use.
OF_TARGETS = ("gap_sentences", "query_column", "references_column")
# Flags that --held_out_by line cannot use.
OF_CONTENT = ("validation_share", "group_column")


@dataclass
class DataArguments:
    """Flags of the documents and their targets."""

    _argument_group_name: ClassVar[str] = "documents"

    dataset: str = flag(
        "stdlib",
        "documents: stdlib (built-in corpus), a file, a folder with train.* and validation.*, a folder written by "
        "save_to_disk, or a data set's name on the Hugging Face Hub",
    )
    dataset_config_name: str | None = flag(
        None,
        "configuration of the data set that --dataset names on the Hugging Face Hub; if not given: its only one",
    )
    train_file: str | None = flag(
        None,
        "training documents, instead of --dataset: JSON Lines (.jsonl or .jsonl.gz), a JSON list, CSV, TSV, Parquet, "
        "a folder of text files, or a folder written by save_to_disk",
    )
    validation_file: str | None = flag(
        None,
        "validation documents, in the formats of --train_file; if not given: the validation split of --dataset, or a "
        "share of the training documents (--validation_share)",
    )
    test_file: str | None = flag(
        None,
        "test documents, in the formats of --train_file; if not given: the test split of --dataset, if there is one",
    )
    group_column: str | None = flag(
        None,
        "column with the name of a document's group; all documents of a group stay in the same split; if not given: "
        "no groups",
    )
    validation_share: float = flag(
        0.1, "share of the training documents held out for validation if there is no validation split, between 0 and 1"
    )
    held_out_by: str = flag(
        "content",
        "rule that chooses the documents of --validation_share: content (by id or content), or line (by id or line "
        "number, as in older runs)",
    )
    encoding: str = flag("utf-8", "character encoding of JSON, CSV, TSV and text files, by its Python name")
    task: str = flag(
        "document",
        "document: one target per document; sections: one target per section; denoise or recall: pretraining on texts "
        "without targets (restore removed spans of each segment; continue a passage of an earlier segment)",
    )
    text_column: str = flag(Columns.text, "column with the text of a document, for --task document")
    summary_column: str = flag(Columns.summary, "column with the target of a document, for --task document")
    sections_column: str = flag(Columns.sections, "column with the list of section texts, for --task sections")
    summaries_column: str = flag(Columns.summaries, "column with the list of section targets, for --task sections")
    references_column: str | None = flag(
        None,
        "column with a list of further references that scores use beside the target. With --task document, a document "
        "without a summary has its first reference as target. With --task sections: a list of lists, one per section; "
        "a section without a summary has no target. If not given: only the target",
    )
    query_column: str | None = flag(
        None,
        "column with a question about the text, which is put before each segment; a document without a question has no "
        "value; with --task document also a list of objects with 'query' and their own summary, one document for each "
        "(commas separate the names of several lists); if not given: no questions",
    )
    source_lang: str | None = flag(
        None,
        "language code of the documents, for a tokenizer of several languages, as MBart's; if not given: the "
        "tokenizer's own",
    )
    target_lang: str | None = flag(
        None, "language code of the targets; if not given: the tokenizer's own, else the language of the documents"
    )
    word_segmenter: str | None = flag(
        None,
        "segmenter that puts spaces between the words of Japanese texts before they are tokenised, as the model's "
        "pretraining did: none, jumanpp, mecab or sudachi; saved with the model; if not given: the tokenizer's own",
    )
    gap_sentences: int = flag(
        0,
        "copies of each training document whose targets are sentences of the document, left in or removed from the "
        "text (PEGASUS); 0: none",
    )
    max_target_length: int = flag(
        MAX_TARGET_LENGTH,
        "largest number of tokens of a target, at least 4; longer targets are cut; in training also the largest length "
        "of a generated text, unless --max_new_tokens is given; --task denoise has targets of a segment's length",
    )
    skip_bad_samples: bool = flag(
        False, "skip documents that are unreadable or empty, and count them; if not given: the run stops at the first"
    )
    cache_dir: str = flag(
        "~/.cache/recurrent_bart", "folder in which tokenised documents and trained tokenizers are cached"
    )

    def __post_init__(self) -> None:
        check_given(self)
        check_choice(self, "task", TASKS)
        check_choice(self, "held_out_by", SPLIT_RULES)
        if not 0 < self.validation_share < 1:
            raise ValueError(f"--validation_share {self.validation_share}: must be above 0 and below 1")
        if self.held_out_by == "line":
            unused = [name for name in OF_CONTENT if getattr(self, name) != getattr(DataArguments, name)]
            if unused:
                raise ValueError(f"--{unused[0]}: has no use with --held_out_by line, which holds out a tenth by name")
        check_encoding(self.encoding)
        check_installed(self.word_segmenter or "none")
        check_at_least(self, 4, "max_target_length")
        check_at_least(self, 0, "gap_sentences")
        given = [name for name in OF_TARGETS if getattr(self, name)] if self.task in PRETRAINING_TASKS else []
        if self.task == "denoise" and self.max_target_length != MAX_TARGET_LENGTH:
            given.append("max_target_length")
        if given:
            raise ValueError(f"--{given[0]}: has no use with --task {self.task}, which makes the targets itself")

    def columns(self) -> Columns:
        """Return the names of the columns to read."""
        return Columns(
            self.text_column,
            self.summary_column,
            self.sections_column,
            self.summaries_column,
            self.group_column,
            self.references_column,
            self.query_column,
        )


def data_flags(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the data flags of a run. Runs older than `--held_out_by` chose validation documents by line number."""
    return {"held_out_by": "line"} | saved
