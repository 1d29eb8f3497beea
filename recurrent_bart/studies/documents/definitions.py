"""Definitions of the studies on documents by name: documents, flags and the models that are compared."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recurrent_bart.studies.documents.text_run import TextRun

Fields = dict[str, Any]

# RMT's layers attend over state and tokens as one sequence
RMT: Fields = {"recurrence": "top", "prefix_attention": "concat", "prefix_projection": False}
# launch/train.py flags of all runs. A step has the same documents in every run.
SHARED: Fields = {
    "segment_size": 512,
    "max_n_segments": 12,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "warmup_steps": 200,
    "eval_every": 100,
    "eval_documents": 64,
    "dataloader_num_workers": 1,
}
# Flags of models that are trained from scratch. Runs end by time and are compared at equal steps, so the learning rate
# must not depend on the total number of steps.
FROM_SCRATCH: Fields = SHARED | {
    "model_size": "small",
    "bptt_depth": -1,
    "learning_rate": 5e-4,
    "adam_beta2": 0.98,
    "lr_scheduler": "constant",
    "max_steps": 1_000_000,
}
# Flags of pretrained models. Runs end after equal steps, so the rate may fall to zero, as in launch/train.py. Greedy
# texts repeat phrases, more or less by model: here no text contains three tokens twice.
PRETRAINED: Fields = SHARED | {
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-4,
    "recurrence_learning_rate": 1e-3,
    "warmup_steps": 60,
    "max_steps": 600,
    "max_target_length": 512,
    "num_beams": 1,
    "do_sample": False,
    "no_repeat_ngram_size": 3,
}
# Additional flags for sections. Gap sentences: with one thousand summaries alone, no new model learned to use the
# document's text (studies/LOG.md).
SECTIONS: Fields = {
    # default, which variants override
    "decoder_context": "last",
    "gap_sentences": 3,
    "per_device_train_batch_size": 16,
    "max_n_segments": 16,
    "max_target_length": 192,
    "vocab_size": 8192,
}
PLAIN: Fields = {"pre_seq_len": 0}
# published model that joins independent segments in the decoder: SLED (arXiv 2208.00748), SegEnc (arXiv 2112.07637)
FUSION: Fields = PLAIN | {"decoder_context": "all"}
RECURRENCES: dict[str, Fields] = {
    "layerwise": {},
    "top (RMT)": {"flags": RMT},
    "none": {"flags": {"recurrence": "none"}},
}
# number of parts of a batch of long inputs, which need more memory than segments
N_PARTS = 4
# changes of one field of the default model for documents
CHANGES: dict[str, Fields] = {
    "learned prefix, no state": {"recurrence": "none"},
    "bptt_depth=0": {"bptt_depth": 0},
    "bptt_depth=2": {"bptt_depth": 2},
    "gated": {"prefix_attention": "gated"},
    "no projection": {"prefix_projection": False},
    "pre_seq_len=8": {"pre_seq_len": 8},
    "pre_seq_len=64": {"pre_seq_len": 64},
    "associative memory": {"associative_memory": True},
    "context_segments=4": {"context_segments": 4},
    "decoder sees states": {"decoder_context": "memory"},
    "decoder sees the last segment": {"decoder_context": "last"},
}


@dataclass(frozen=True)
class TextStudy:
    """Study on documents.

    Attributes:
        task: Value of `--task`: one target per document, or per section.
        flags: launch/train.py flags of all runs.
        variants: TextRun fields of each model. Reports compare every model with the first one. `overlap` is the share
            of a segment's positions that repeat the end of the previous segment.
        is_pretrained: The models start from `--model_name_or_path`.
        seconds: Limit of the training time of a run, None without a limit.
    """

    task: str
    flags: Fields
    variants: dict[str, Fields] = field(default_factory=dict)
    is_pretrained: bool = False
    seconds: float | None = None


TEXT_STUDIES: dict[str, TextStudy] = {
    "document": TextStudy(
        "document",
        FROM_SCRATCH,
        {
            **RECURRENCES,
            "BART, first 1,024 tokens": {"flags": PLAIN, "reads": "heads"},
            "BART, last segment": {"flags": PLAIN | {"decoder_context": "last"}},
            "LED": {"reads": "whole", "model": "led"},
        },
        seconds=300.0,
    ),
    "sections": TextStudy(
        "sections",
        FROM_SCRATCH | SECTIONS,
        {
            **RECURRENCES,
            "layerwise, states of all segments": {"flags": {"decoder_context": "memory"}},
            "layerwise, last two segments of the section": {
                "flags": {"decoder_context": "section", "context_segments": 2}
            },
            "layerwise, tokens of the section": {"flags": {"decoder_context": "section"}},
            "layerwise, tokens of all segments": {"flags": {"decoder_context": "all"}},
            "BART, first 1,024 tokens of each section": {"flags": PLAIN, "reads": "heads"},
            "BART, last segment of each section": {"flags": PLAIN},
        },
        seconds=300.0,
    ),
    "documents-pretrained": TextStudy(
        "document",
        PRETRAINED,
        {
            "layerwise": {},
            "BART, first 1,024 tokens": {"flags": PLAIN, "reads": "heads"},
            "SegEnc": {"flags": FUSION},
            "SegEnc, segment numbers": {"flags": FUSION, "model": "numbered"},
            "SegEnc, segment numbers, half overlap": {"flags": FUSION, "model": "numbered", "overlap": 0.5},
            "RMT": {"flags": RMT | {"decoder_context": "last", "bptt_depth": 2}},
            "LED": {"reads": "whole", "model": "led"},
            "BART, full attention": {"flags": PLAIN, "reads": "whole"},
            "layerwise, a quarter of overlap": {"overlap": 0.25},
            **{f"layerwise, {name}": {"flags": flags} for name, flags in CHANGES.items()},
        },
        is_pretrained=True,
    ),
    "sections-pretrained": TextStudy(
        "sections",
        PRETRAINED | {"max_n_segments": 16, "max_target_length": 256},
        {
            "layerwise, tokens of the section": {"flags": {"decoder_context": "section"}},
            "layerwise, tokens of all segments": {"flags": {"decoder_context": "all", "bptt_depth": -1}},
            "layerwise, states of all segments": {"flags": {"decoder_context": "memory"}},
            "layerwise, last segment": {"flags": {"decoder_context": "last"}},
            "SegEnc, tokens of the section": {"flags": PLAIN | {"decoder_context": "section"}},
            "SegEnc, tokens of all segments": {"flags": FUSION},
            "BART, first 1,024 tokens of each section": {
                "flags": PLAIN | {"decoder_context": "last"},
                "reads": "heads",
            },
        },
        is_pretrained=True,
    ),
}


def build_text_study(
    name: str, dataset: str = "stdlib", seeds: Iterable[int] = range(3), seconds: float | None = None, **changes: Any
) -> list[TextRun]:
    """Build the runs of a study on documents, one per seed and model.

    `dataset` is the value of `launch/train.py --dataset`. `seconds` limits the training time of a run; None means the
    study's limit. `changes` are `launch/train.py` flags that override the study's flags in all runs. The flags of a
    variant override `changes` and the study's flags.

    Raises:
        ValueError: The study needs a pretrained model, or takes none.
    """
    study = TEXT_STUDIES[name]
    if study.is_pretrained != ("model_name_or_path" in changes):
        needed = "needs the folder of a pretrained BART" if study.is_pretrained else "trains from scratch: leave out"
        raise ValueError(f"study {name} {needed} (--set model_name_or_path=FOLDER)")
    flags = study.flags | {"dataset": dataset, "task": study.task} | changes
    # a run of few steps must not warm up for longer than it lasts
    flags["warmup_steps"] = min(int(flags["warmup_steps"]), int(flags["max_steps"]))
    documents, limit = f"{Path(dataset).name} {name}", seconds or study.seconds
    return [
        TextRun(variant, documents, flags | _own_flags(flags, fields), seed, seconds=limit, **_how(fields))
        for seed in seeds
        for variant, fields in study.variants.items()
    ]


def _how(fields: Fields) -> Fields:
    return {name: value for name, value in fields.items() if name in ("reads", "model")}


def _own_flags(flags: Fields, fields: Fields) -> Fields:
    """Return the flags of a variant. Its runs read as much of the same documents in a step as the other runs."""
    own: Fields = dict(fields.get("flags", {}))
    if fields.get("overlap"):
        size, n_segments, new = int(flags["segment_size"]), int(flags["max_n_segments"]), 1 - fields["overlap"]
        own |= {"segment_size": round(size * new), "input_size": size, "max_n_segments": round(n_segments / new)}
    if fields.get("reads") == "whole":
        n_documents = int(flags["per_device_train_batch_size"])
        n_parts = math.gcd(n_documents, N_PARTS)
        own["per_device_train_batch_size"] = n_documents // n_parts
        own["gradient_accumulation_steps"] = n_parts * int(flags.get("gradient_accumulation_steps", 1))
    return own
