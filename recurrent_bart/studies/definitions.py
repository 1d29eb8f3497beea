"""The studies by name: what is compared, on which tasks and documents."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurrent_bart.configuration_recurrent_bart import PREFIX_ATTENTIONS
from recurrent_bart.studies.documents.text_run import READINGS, TextRun
from recurrent_bart.studies.study_run import StudyRun

Fields = dict[str, Any]

# fields of StudyRun for each task
COPY: Fields = {"task": {"name": "copy"}, "learning_rate": 1e-3}
# its answer grows with the document, and positions of the decoder beyond those trained are random; after a stage of one
# segment, with gates what is read in the last one is all that is ever told (RESULTS.md)
RECALL: Fields = {
    "task": {"name": "recall"},
    "stages": (8,),
    "test_segments": (1, 2, 4, 8),
    "learning_rate": 3e-4,
    "adam_beta2": 0.98,
    "max_steps": 7000,
}
# a key must be bound to its value before either can be carried: within a segment first, then over as many as there will
# be, of few tokens and pairs (RESULTS.md)
RETRIEVAL: Fields = {
    "task": {"name": "retrieval"},
    "easier": (
        *({"segment_size": size, "n_pairs": 2, "n_queries": 1} for size in (6, 8)),
        *(
            {"segment_size": size, "n_segments": 8, "n_pairs": size // 4, "n_queries": size // 4}
            for size in (8, 12, 16, 24)
        ),
    ),
    "stages": (8,),
    "stage_steps": 4000,
    "learning_rate": 5e-4,
    "max_steps": 6000,
    "encoder_loss": 1.0,
}
DENOISING: Fields = RETRIEVAL | {"task": {"name": "retrieval", "is_denoising": True}}
# a model and a task that a processor learns in a minute
QUICK: Fields = {
    "task": {"name": "copy", "n_payload": 4, "n_symbols": 8, "n_fillers": 4},
    "segment_size": 8,
    "stages": (1, 2, 4),
    "test_segments": (1, 2, 4, 8, 16),
    "max_steps": 1200,
    "batch_size": 32,
    "learning_rate": 3e-3,
    "warmup_steps": 50,
    "eval_every": 50,
    "eval_documents": 64,
}
QUICK_MODEL: Fields = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "pre_seq_len": 8,
    "prefix_hidden_size": 64,
    "init_std": 0.06,
}
SYMBOLS = (COPY, RECALL, RETRIEVAL)
# bAbI: words of a segment, and most segments. qa1 begins with short stories, over several segments early
QA1: Fields = {
    "easier": tuple(
        {"segment_size": size, "n_segments": most} for size, most in ((24, 1), (24, 2), (24, 8), (64, 8), (128, 8))
    )
}
# where people are first; then stories of every length, for of short ones there are few, with names that change, else
# they are learnt by heart; an answer is who has it and where it is (RESULTS.md)
MORE_FACTS: Fields = {
    "task": {
        "with_subjects": True,
        "renamed": (
            ("mary", "sandra", "john", "daniel"),
            ("bathroom", "bedroom", "kitchen", "garden", "office", "hallway"),
            ("football", "milk", "apple"),
        ),
    },
    "easier": (
        {"task": "qa1", "segment_size": 24},
        *({"segment_size": size, "n_segments": most} for size, most in ((192, 1), (64, 8), (128, 8))),
    ),
    "stage_steps": 20_000,
    "max_steps": 60_000,
}


@dataclass(frozen=True)
class Texts:
    """What is read.

    Attributes:
        facts: Folder of bAbI's facts.
        filler: Folder of other text to scatter them in.
        dataset: Documents of the text studies, as `launch/train.py --dataset`.
    """

    facts: str | None = None
    filler: str | None = None
    dataset: str = "stdlib"

    def babi(self) -> list[Fields]:
        """Fields of StudyRun for qa1 to qa3; 64 segments are 16,384 words.

        Raises:
            ValueError: The folders are not given.
        """
        if self.facts is None or self.filler is None:
            raise ValueError("bAbI needs --facts and --filler: folders with train.jsonl and validation.jsonl")
        texts = {"name": "babi", "facts": self.facts, "filler": self.filler}
        settings: Fields = {
            "segment_size": 256,
            "stages": (8,),
            "stage_steps": 4000,
            # with 1e-3 none was learnt (RESULTS.md)
            "learning_rate": 3e-4,
            "encoder_loss": 1.0,
        }
        by_task = {"qa1": QA1, "qa2": MORE_FACTS, "qa3": MORE_FACTS}
        return [
            settings | fields | {"task": texts | {"task": task} | fields.get("task", {})}
            for task, fields in by_task.items()
        ]


def _layerwise() -> dict[str, Fields]:
    switches = itertools.product(PREFIX_ATTENTIONS, (True, False), (True, False))
    return {
        f"layerwise {attention}{' projection' * projection}{' update-gate' * gate}": {
            "model": {"prefix_attention": attention, "prefix_projection": projection, "update_gate": gate}
        }
        for attention, projection, gate in switches
    }


# its layers attend over memory and tokens as over one text
RMT: Fields = {"recurrence": "top", "prefix_attention": "concat", "prefix_projection": False}
# every alternative to the recurrence; the windows are plain BART's
ALTERNATIVES: dict[str, Fields] = {
    **_layerwise(),
    "top update-gate (RMT)": {"model": RMT | {"update_gate": True}},
    "top (RMT)": {"model": RMT | {"update_gate": False}},
    "none": {"model": {"recurrence": "none"}},
    "BART, one window": {"model": {"pre_seq_len": 0}, "window": "all"},
    "BART, last segment": {"model": {"pre_seq_len": 0}, "window": "last"},
}
LAYERWISE, GATED = (f"layerwise {attention} projection update-gate" for attention in PREFIX_ATTENTIONS)
ESSENTIALS = {name: ALTERNATIVES[name] for name in (LAYERWISE, "top update-gate (RMT)", "BART, one window")}
# what slots do not hold: by which key a value is found
MATRIX: Fields = {"associative_memory": True, "matrix_gate_init": 1.0}
ASSOCIATIVE: dict[str, Fields] = {
    f"{name}, associative memory": {"model": ALTERNATIVES[name]["model"] | MATRIX} for name in (LAYERWISE, GATED)
}
# what it is learnt with, one thing at a time
LESSONS: dict[str, Fields] = {
    f"{LAYERWISE}, no loss of the encoder": {"encoder_loss": 0.0},
    f"{LAYERWISE}, no easier stages": {"easier": ()},
    f"{LAYERWISE}, neither": {"encoder_loss": 0.0, "easier": ()},
}
DEPTHS: dict[str, Fields] = {f"bptt_depth={depth}": {"model": {"bptt_depth": depth}} for depth in (0, 1, 2, 4, -1)}
WIDTHS: dict[str, Fields] = {f"pre_seq_len={n}": {"model": {"pre_seq_len": n}} for n in (4, 8, 16, 32, 64, 128)}
CONTEXTS: dict[str, Fields] = {
    f"decoder_context={name}": {"model": {"decoder_context": name}} for name in ("last", "memory", "all")
}


# tasks, None for those of bAbI, and what is compared on each
STUDIES: dict[str, tuple[Iterable[Fields] | None, dict[str, Fields]]] = {
    "quick": (
        [QUICK],
        {
            "layerwise": {"model": QUICK_MODEL},
            "BART, last segment": {"model": QUICK_MODEL | {"pre_seq_len": 0}, "window": "last"},
        },
    ),
    "recurrence": (SYMBOLS, ALTERNATIVES | ASSOCIATIVE),
    "depth": ((COPY, RECALL), DEPTHS),
    "width": ((COPY, RECALL), WIDTHS),
    "context": (SYMBOLS, CONTEXTS),
    "retrieval": ((RETRIEVAL, DENOISING), ESSENTIALS | ASSOCIATIVE | LESSONS),
    "babi": (None, ALTERNATIVES | ASSOCIATIVE),
}


# flags of launch/train.py that all runs on documents share: every evaluation comes after the same steps whatever the
# time, so the learning rate does not depend on how many there will be
TEXT: Fields = {
    "model_size": "small",
    "segment_size": 512,
    "max_n_segments": 12,
    "bptt_depth": -1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "learning_rate": 5e-4,
    "adam_beta2": 0.98,
    "lr_scheduler": "constant",
    "warmup_steps": 200,
    "max_steps": 1_000_000,
    "eval_every": 100,
    "eval_documents": 64,
    "dataloader_num_workers": 1,
}
# and beside those of each kind of target. From a thousand summaries alone no model learnt to use what it reads
# (RESULTS.md)
OWN_TEXT: dict[str, Fields] = {
    "document": {},
    "sections": {
        # where a model names nothing else
        "decoder_context": "last",
        "gap_sentences": 3,
        "per_device_train_batch_size": 16,
        "max_n_segments": 16,
        "max_target_length": 192,
        "vocab_size": 8192,
    },
}
PLAIN: Fields = {"flags": {"pre_seq_len": 0}}
RECURRENCES: dict[str, Fields] = {
    "layerwise": {},
    "top (RMT)": {"flags": RMT},
    "none": {"flags": {"recurrence": "none"}},
}
# fields of TextRun for each kind of target; differences are to the first
TEXT_STUDIES: dict[str, dict[str, Fields]] = {
    "document": {
        **RECURRENCES,
        "BART, first 1,024 tokens": PLAIN | {"reads": "heads"},
        "BART, last segment": PLAIN,
        "LED": {"reads": "whole"},
    },
    "sections": {
        **RECURRENCES,
        "layerwise, states of all segments": {"flags": {"decoder_context": "memory"}},
        "layerwise, last two segments of the section": {"flags": {"decoder_context": "section", "context_segments": 2}},
        "layerwise, tokens of the section": {"flags": {"decoder_context": "section"}},
        "layerwise, tokens of all segments": {"flags": {"decoder_context": "all"}},
        "BART, first 1,024 tokens of each section": PLAIN | {"reads": "heads"},
        "BART, last segment of each section": PLAIN,
    },
}


def build_text_study(
    task: str, texts: Texts, seeds: Iterable[int] = range(3), seconds: float | None = None, **changes: Any
) -> list[TextRun]:
    """The runs of a study on documents with one target each, or one per section.

    Args:
        task: `"document"` or `"sections"`.
        texts: Which documents.
        seeds: Of each model's runs.
        seconds: Of training.
        changes: Flags of all runs that are others than the study's own.
    """
    flags = TEXT | OWN_TEXT[task] | {"dataset": texts.dataset, "task": task} | changes
    # a run that is cut short warms up all its time
    flags["warmup_steps"] = min(int(flags["warmup_steps"]), int(flags["max_steps"]))
    documents = f"{Path(texts.dataset).name} {task}"
    return [
        TextRun(
            variant,
            documents,
            flags | fields.get("flags", {}),
            seed,
            seconds=seconds,
            reads=fields.get("reads", READINGS[0]),
        )
        for seed in seeds
        for variant, fields in TEXT_STUDIES[task].items()
    ]


def build_study(name: str, texts: Texts, seeds: Iterable[int] = range(3)) -> list[StudyRun]:
    """The runs of a study.

    Raises:
        ValueError: There is no such study, or it needs texts that are not given.
    """
    if name not in STUDIES:
        raise ValueError(f"study {name}: known are {', '.join((*STUDIES, *TEXT_STUDIES))}")
    tasks, variants = STUDIES[name]
    # all variants with one seed first: a study that is cut off can compare them
    return [
        StudyRun(name=variant, seed=seed, **task | fields)
        for seed in seeds
        for task in (texts.babi() if tasks is None else tasks)
        for variant, fields in variants.items()
    ]
