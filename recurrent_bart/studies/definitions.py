"""Definitions of the studies on memory tasks by name: tasks and the models that are compared."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from recurrent_bart.configuration_recurrent_bart import PREFIX_ATTENTIONS
from recurrent_bart.studies.documents.definitions import RMT, TEXT_STUDIES
from recurrent_bart.studies.study_run import StudyRun

Fields = dict[str, Any]

# fields of StudyRun for each task
COPY: Fields = {"task": {"name": "copy"}, "learning_rate": 1e-3}
# The answer grows with the document, and decoder positions beyond the trained lengths stay random: tests end at 8
# segments. After a first stage of one segment, gated models only ever return the last segment's symbols
# (studies/LOG.md).
RECALL: Fields = {
    "task": {"name": "recall"},
    "stages": (8,),
    "test_segments": (1, 2, 4, 8),
    "learning_rate": 3e-4,
    "adam_beta2": 0.98,
    "max_steps": 7000,
}
# A model must bind a key to its value before it can carry either. The easier stages train this within one segment,
# then over 8 short segments with few pairs (studies/LOG.md).
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
# one minute of training on a CPU is enough for this task with QUICK_MODEL
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
# Stages of the bAbI task qa1. Segments are short in the first stages, and the number of segments soon grows.
QA1: Fields = {
    "easier": tuple(
        {"segment_size": size, "n_segments": most} for size, most in ((24, 1), (24, 2), (24, 8), (64, 8), (128, 8))
    )
}
# Stages of qa2 and qa3. The first stage is qa1: where people are. The next stages use stories of every length, because
# few stories are short. Names are permuted in every document, else the model memorizes the stories. An answer states
# who has the object and where it is (studies/LOG.md).
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
    """Folders with bAbI's facts and with filler text."""

    facts: str | None = None
    filler: str | None = None

    def babi(self) -> list[Fields]:
        """Return the StudyRun fields of the tasks qa1 to qa3. A document of 64 segments has 16,384 words.

        Raises:
            ValueError: `facts` or `filler` is missing.
        """
        if self.facts is None or self.filler is None:
            raise ValueError("bAbI needs --facts and --filler: folders with train.jsonl and validation.jsonl")
        texts = {"name": "babi", "facts": self.facts, "filler": self.filler}
        settings: Fields = {
            "segment_size": 256,
            "stages": (8,),
            "stage_steps": 4000,
            # no task was learnt with 1e-3 (studies/LOG.md)
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


# All models that studies compare. Entries with `window` are plain BART.
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
# The associative memory is a matrix that finds a value by its key. The positions of the state cannot.
MATRIX: Fields = {"associative_memory": True, "matrix_gate_init": 1.0}
ASSOCIATIVE: dict[str, Fields] = {
    f"{name}, associative memory": {"model": ALTERNATIVES[name]["model"] | MATRIX} for name in (LAYERWISE, GATED)
}
# ablations of the training method (second loss, easier stages)
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


# study name -> tasks (None: the bAbI tasks, which need texts), and the variants that the study compares on each task
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


def build_study(name: str, texts: Texts, seeds: Iterable[int] = range(3)) -> list[StudyRun]:
    """Build the runs of a study on memory tasks.

    Raises:
        ValueError: The name is unknown, or the study needs texts that are missing.
    """
    if name not in STUDIES:
        raise ValueError(f"study {name}: allowed are {', '.join((*STUDIES, *TEXT_STUDIES))}")
    tasks, variants = STUDIES[name]
    # Seeds are the outer loop, so a study that stops early has all variants for the first seeds.
    return [
        StudyRun(name=variant, seed=seed, **task | fields)
        for seed in seeds
        for task in (texts.babi() if tasks is None else tasks)
        for variant, fields in variants.items()
    ]
