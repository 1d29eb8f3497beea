"""Evaluate a model: `python launch/evaluate.py --model RUN/model --split validation`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.utils import logging

from recurrent_bart.commands.exit_codes import leave_process_group, print_mistake
from recurrent_bart.data.batches import DocumentPlan
from recurrent_bart.data.cuts import describe_cuts
from recurrent_bart.data.rows import PRETRAINING_TASKS, SPLITS
from recurrent_bart.data.word_segmenter import check_installed, segmenter_of
from recurrent_bart.distributed import (
    SharedError,
    first_then_all,
    is_first,
    log_on_first_rank,
    only_first,
    run_on_all_ranks,
)
from recurrent_bart.evaluation.evaluator import Evaluator, Generation
from recurrent_bart.evaluation.model_scores import load_scorers
from recurrent_bart.evaluation.predictions import FILE_NAME, Prediction, write_predictions
from recurrent_bart.evaluation.results import Results, summarize_predictions
from recurrent_bart.evaluation.scoring import score_samples
from recurrent_bart.files import atomic_write
from recurrent_bart.inference.stream_reader import load_model, run_flags
from recurrent_bart.model.generation_settings import (
    change_settings,
    contradictions,
    describe_limit,
    describe_settings,
    text_length,
)
from recurrent_bart.monitoring.progress import say
from recurrent_bart.training.argument_fields import flag
from recurrent_bart.training.data_arguments import DataArguments, data_flags
from recurrent_bart.training.environment import Environment, launched_rank, start_processes, use_bf16
from recurrent_bart.training.flags import DataclassFlagParser
from recurrent_bart.training.generation_arguments import GenerationArguments
from recurrent_bart.training.preparation import open_documents, sources_of
from recurrent_bart.training.run_arguments import PRECISIONS

# Flags for the documents. If one of these flags is given, the values of all four flags in the run are ignored, and
# the value of --dataset_config_name too.
PLACES = ("dataset", "train_file", "validation_file", "test_file")


@dataclass(kw_only=True)
class EvaluationArguments(GenerationArguments):
    """Arguments of an evaluation."""

    _argument_group_name: ClassVar[str] = "evaluation and generation"

    model: str = field(metadata={"help": "folder of the model to evaluate: RUN/model"})
    split: str = flag("validation", "split to evaluate on: train, validation or test")
    limit: int = flag(-1, "number of documents to evaluate on, from the first on; -1 is all")
    batch_size: int = flag(8, "documents per forward pass on each rank")
    max_n_segments: int = flag(-1, "maximum number of segments read per document; -1 is all, as in launch/summarize.py")
    trust_remote_code: bool = flag(False, "run Python code from the tokenizer's folder")
    json: str | None = flag(
        None,
        "JSON file for the results; the texts with their scores go beside it, as NAME.predictions.jsonl; if not given: "
        "the results are only printed",
    )
    bertscore_model: str | None = flag(
        None, "folder or name of an encoder for BERTScore, for example roberta-large; if not given: no BERTScore"
    )
    bertscore_layer: int = flag(
        -1, "layer of --bertscore_model whose embeddings are compared; 0: its embeddings; -1: its last layer"
    )
    factuality_model: str | None = flag(
        None,
        "folder or name of a classifier of (source, sentence) pairs, for example MiniCheck or an entailment model; "
        "the factuality score is its probability that the source supports a sentence; if not given: not measured",
    )
    rouge_segmenter: str | None = flag(
        None,
        "segmenter of ROUGE's words in Japanese texts: none, jumanpp, mecab or sudachi; if not given: the model's; "
        "without one, ROUGE compares characters",
    )
    with_source: bool = flag(False, "with --json: write the source texts with the predictions")
    seed: int = flag(42, "seed of the texts drawn with --do_sample")
    precision: str = flag("auto", "bf16, fp32, or auto: bf16 if the device supports it, fp32 otherwise")
    timeout_minutes: int = flag(60, "minutes that a rank waits for another rank before it fails")
    local_rank: int = flag(-1, "rank on this node; set by the deepspeed launcher")

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = {"split": SPLITS, "precision": PRECISIONS}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"--{name} {getattr(self, name)}: allowed are {', '.join(values)}")
        for name in ("batch_size", "timeout_minutes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("limit", "max_n_segments"):
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1, or -1 for all")
        if self.with_source and not self.json:
            raise ValueError("--with_source: give --json FILE too, beside which the predictions are written")
        check_installed(self.rouge_segmenter or "none", "--rouge_segmenter")
        if self.bertscore_layer != -1 and not self.bertscore_model:
            raise ValueError(f"--bertscore_layer {self.bertscore_layer}: give --bertscore_model too")
        if self.json and Path(self.json).is_dir():
            raise ValueError(f"--json {self.json}: is a folder; give the name of a file")
        if self.json and not Path(self.json).absolute().parent.is_dir():
            raise ValueError(f"--json {self.json}: the folder {Path(self.json).parent} does not exist")


def parse_arguments(argv: Sequence[str]) -> tuple[EvaluationArguments, DataArguments]:
    """Parse a command line. Data flags default to the values of the run that trained the model.

    Raises:
        ValueError: A flag is unknown or out of range, or the run's configuration is unreadable.
    """
    description = (
        "Compute validation loss and ROUGE of a model. The default of a data flag is the value of the model's run."
    )
    parser = DataclassFlagParser([EvaluationArguments, DataArguments], description)
    saved = run_flags(parser.parse_flags(argv).model).get("data", {})
    saved = data_flags(saved) if saved else saved
    names = {item.name for item in fields(DataArguments)}
    if _given_places(argv):
        names -= {*PLACES, "dataset_config_name"}
    parser.set_defaults(**{name: value for name, value in saved.items() if name in names})
    evaluation, data = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    if data.task in PRETRAINING_TASKS:
        raise ValueError(
            f"--task {data.task}: these documents have no reference texts; give documents with summaries: "
            "--task document --dataset ..."
        )
    return evaluation, data


def _given_places(argv: Sequence[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name in PLACES:
        # Flags accept hyphens and underscores.
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    return list(vars(parser.parse_known_args(argv)[0]))


def evaluate(
    arguments: EvaluationArguments, data: DataArguments, environment: Environment
) -> tuple[Results, list[Prediction]]:
    """Compute loss and ROUGE. Each rank reads a part of the documents. All ranks return the same results.

    Raises:
        ValueError: The model or the documents are unusable.
    """
    dtype = torch.bfloat16 if use_bf16(arguments.precision, environment.device) else torch.float32
    model, tokenizer = load_model(arguments.model, environment.device, dtype, arguments.trust_remote_code)
    check_languages(data, tokenizer)
    scorers = run_on_all_ranks(
        lambda: load_scorers(
            arguments.bertscore_model, arguments.bertscore_layer, arguments.factuality_model, environment.device
        )
    )
    sources = sources_of(data)
    if arguments.split not in sources:
        raise ValueError(f"--split {arguments.split}: the data set has the splits {', '.join(sources)}")
    source, cap = sources[arguments.split], arguments.max_n_segments
    documents = first_then_all(lambda: open_documents(source, data, model.config, tokenizer, cap))
    for line in describe_cuts(arguments.split, documents.plan, documents.collator):
        say(line)
    plan = first_documents(documents.plan, arguments.limit)
    evaluator = Evaluator(
        documents.corpus, plan, documents.collator, tokenizer, arguments.batch_size, environment.device
    )
    generation, given = model.generation_config, arguments.generation_settings()
    longest = text_length(model.config, generation, given, documents.collator.max_target_length)
    change_settings(generation, given, longest)
    limits = describe_limit(model.config, data.max_target_length)
    said = *limits, describe_settings(generation, longest), *map(str, contradictions(generation, documents.targets()))
    for line in said:
        say(line)
    loss = evaluator.loss(model)
    torch.manual_seed(arguments.seed + environment.rank)
    samples = evaluator.summarise(model, Generation(longest))
    predictions = score_samples(evaluator, samples, scorers, arguments.with_source, arguments.rouge_segmenter)
    return summarize_predictions(evaluator.n_documents, loss, predictions), predictions


def check_languages(data: DataArguments, tokenizer: Any) -> None:
    """Raise ValueError if a flag of language or words differs from what the model's tokenizer was saved with."""
    own = segmenter_of(tokenizer)
    if data.word_segmenter not in (None, own):
        raise ValueError(f"--word_segmenter {data.word_segmenter}: must be {own}, with which the model was trained")
    for flag_name, name in (("source_lang", "src_lang"), ("target_lang", "tgt_lang")):
        given, own = getattr(data, flag_name), tokenizer.init_kwargs.get(name)
        if given is not None and own is not None and given != own:
            raise ValueError(f"--{flag_name} {given}: must be {own}, the language that the model was trained with")


def first_documents(plan: DocumentPlan, limit: int) -> DocumentPlan:
    """Return a plan with only the first `limit` documents. -1 keeps all documents."""
    end = None if limit == -1 else limit
    return replace(plan, indices=plan.indices[:end], n_segments=plan.n_segments[:end])


def report(results: Results, predictions: list[Prediction], file: str | None) -> None:
    """Print the results. If `file` is given, write them to it, and the predictions beside it.

    Raises:
        ValueError: The file cannot be written.
    """
    print("\n".join(results.lines()), flush=True)
    if file:
        try:
            write_predictions(Path(f"{file.removesuffix('.json')}.{FILE_NAME}"), predictions)
            atomic_write(Path(file), json.dumps(asdict(results), indent=2) + "\n")
        except OSError as error:
            raise ValueError(f"--json {file}: cannot be written ({error.strerror})") from error


def main(argv: Sequence[str]) -> int:
    """Evaluate the model, print the results on rank 0, and return the exit code."""
    rank = launched_rank()
    try:
        arguments, data = parse_arguments(argv)
    except ValueError as error:
        # All ranks parse the same command line, but some ranks start much earlier than rank 0.
        if rank == 0:
            return print_mistake(error)
        log_on_first_rank(seconds=30)
        return 2
    logging.disable_progress_bar()
    try:
        environment = start_processes(arguments.timeout_minutes, with_deepspeed=False)
        results, predictions = evaluate(arguments, data, environment)
        only_first(lambda: report(results, predictions, arguments.json))
    except SharedError:
        log_on_first_rank(seconds=1)
        return 2
    except ValueError as error:
        return print_mistake(error) if is_first() else 2
    return 0


def run(argv: Sequence[str]) -> int:
    """Run the command as a process. Return the exit code."""
    return leave_process_group(main(argv))
