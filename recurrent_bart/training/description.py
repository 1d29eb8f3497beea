"""Description of a run before it starts, and values derived from its flags."""

from typing import Any

from deepspeed import DeepSpeedEngine
from transformers import GenerationConfig

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.batches import DocumentOrder
from recurrent_bart.data.cuts import describe_cuts
from recurrent_bart.data.rows import PRETRAINING_TASKS
from recurrent_bart.model.generation_settings import contradictions, describe_limit, describe_settings, text_length
from recurrent_bart.model.loading import is_recurrence
from recurrent_bart.model.scheduled_sampling import Oracle, gold_probability
from recurrent_bart.training.arguments import Arguments
from recurrent_bart.training.document_order import describe_data_order
from recurrent_bart.training.environment import Environment
from recurrent_bart.training.optimization import LearningRates
from recurrent_bart.training.preparation import Preparation
from recurrent_bart.training.resumed_flags import describe_changes
from recurrent_bart.training.run_arguments import RunArguments


def learning_rates(arguments: Arguments, config: RecurrentBartConfig) -> LearningRates:
    """Return the peak learning rates of a run."""
    return LearningRates.of(arguments.run, arguments.model.model_name_or_path is not None, config.d_model)


def generated_length(run: RunArguments, prepared: Preparation) -> int:
    """Return the maximum number of tokens of a generated text: `--max_new_tokens`, else the length of targets.

    The setting of a pretrained model does not count, because this run's targets may be longer.
    """
    usual = prepared.splits["validation"].collator.max_target_length
    return text_length(prepared.config, GenerationConfig(), run.generation_settings(), usual)


def resolved_settings(arguments: Arguments, config: RecurrentBartConfig, order: DocumentOrder) -> dict[str, Any]:
    """Return the values of flags whose default follows from other flags.

    The run saves the flags as given, so that `--resume` derives the defaults again from the flags of the resumed run.
    """
    run, rates = arguments.run, learning_rates(arguments, config)
    curriculum = run.build_curriculum()
    return {
        "max_steps": run.max_steps,
        "num_train_epochs": round(order.epoch(run.max_steps), 4),
        "warmup_steps": run.warmup_steps,
        "eval_every": run.eval_every,
        "learning_rate": rates.backbone,
        "recurrence_learning_rate": rates.recurrence,
        "per_device_eval_batch_size": run.per_device_eval_batch_size or run.per_device_train_batch_size,
        "curriculum_steps": curriculum.stage_steps if curriculum else None,
        "lora_alpha": arguments.model.lora_strength() if arguments.model.lora_r else None,
    }


def oracle_at(run: RunArguments, order: DocumentOrder, step: int) -> Oracle | None:
    """Return the oracle that replaces decoder inputs in scheduled sampling at a step, or None without `--oracle`."""
    if run.oracle == "none":
        return None
    share = gold_probability(order.epoch(step), run.oracle_decay)
    return Oracle(run.oracle, share, run.oracle_temperature, run.oracle_beams)


def describe(
    arguments: Arguments, order: DocumentOrder, environment: Environment, prepared: Preparation, engine: DeepSpeedEngine
) -> list[str]:
    """Return the lines that describe a run before it starts, with the derivation of each derived quantity."""
    run, config = arguments.run, prepared.config
    train, validation = prepared.splits["train"].plan, prepared.splits["validation"].plan
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.module.named_parameters()}
    trained = sum(sizes[name] for name, parameter in engine.module.named_parameters() if parameter.requires_grad)
    total, own = sum(sizes.values()), sum(size for name, size in sizes.items() if is_recurrence(name))
    rates = learning_rates(arguments, config)
    n_segments = sum(train.n_segments) / len(train.indices)
    lines = [
        f"run        {prepared.folder.path}",
        *describe_changes(prepared.changes, run.metric_for_best_model),
        f"model      {total / 1e6:.1f} M parameters, {own / 1e6:.1f} M in the recurrence; "
        f"{trained / 1e6:.1f} M trained ({100 * trained / total:.1f} %)",
        f"segments   {config.segment_size} tokens, {config.pre_seq_len} prefix positions, "
        f"bptt_depth {config.bptt_depth}, at most {config.max_n_segments} segments per document",
        f"documents  {len(train.indices)} for training, with {n_segments:.1f} segments on average; "
        f"{len(validation.indices)} for validation; task {arguments.data.task}",
        *describe_data_order(arguments, prepared, environment.world_size, order),
        f"rates      {rates.backbone:.1e}, recurrence {rates.recurrence:.1e}, {run.lr_scheduler} decay after "
        f"{run.warmup_steps} warm-up steps",
        f"engine     ZeRO-{engine.zero_optimization_stage()}, {environment.device.type}, "
        f"{'bf16' if engine.bfloat16_enabled() else 'fp32'}",
    ]
    if run.label_smoothing_factor:
        lines.append(f"loss       label smoothing {run.label_smoothing_factor:g} in training, none in validation")
    curriculum = run.build_curriculum()
    if curriculum:
        reached = "" if run.curriculum_loss is None else f" or at a training loss of {run.curriculum_loss:g}"
        lines.append(
            f"curriculum 1 to {' / '.join(map(str, curriculum.stages))} segments per document; the next stage after "
            f"{curriculum.stage_steps} steps{reached}"
        )
    first, last = oracle_at(run, order, 0), oracle_at(run, order, run.max_steps)
    if first and last:
        lines.append(
            f"oracle     {run.oracle}; share of target words in the decoder's input: {first.gold_probability:.2f} at "
            f"the start, {last.gold_probability:.2f} at the end"
        )
    for name, documents in prepared.splits.items():
        lines += describe_cuts({"train": "training"}.get(name, name), documents.plan, documents.collator)
    generates = arguments.data.task not in PRETRAINING_TASKS
    return lines + (_describe_generation(arguments, prepared, engine) if generates else [])


def _describe_generation(arguments: Arguments, prepared: Preparation, engine: DeepSpeedEngine) -> list[str]:
    generation, validation = engine.module.generation_config, prepared.splits["validation"]
    return [
        *describe_limit(prepared.config, arguments.data.max_target_length),
        describe_settings(generation, generated_length(arguments.run, prepared)),
        *map(str, contradictions(generation, validation.targets())),
    ]
