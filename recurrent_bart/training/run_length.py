"""Length of a run in optimizer steps, from `--max_steps`, `--num_train_epochs` or their default."""

from dataclasses import replace

from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.data.batches import DocumentOrder
from recurrent_bart.data.stdlib import EMBEDDED
from recurrent_bart.distributed import stop_all
from recurrent_bart.training.arguments import Arguments
from recurrent_bart.training.data_arguments import DataArguments
from recurrent_bart.training.resumed_flags import Changes
from recurrent_bart.training.run_arguments import NOT_GIVEN, RunArguments

# default length: passes over a given data set, or steps on the embedded corpus
N_EPOCHS = 3.0
N_EMBEDDED_STEPS = 50


def with_length(arguments: Arguments, order: DocumentOrder, state: TrainerState, changes: Changes) -> Arguments:
    """Return the arguments with the number of steps, and with the settings that follow from this number.

    Passes over the documents are counted from the start of the run. A run that is resumed with other batches therefore
    reads as many documents as the run would have read before.

    Raises:
        ValueError: The run is shorter than its warm-up, or a given length is shorter than the run has trained.
    """
    run = arguments.run
    max_steps = _n_steps(arguments, order)
    given = {name: changes[name][1] for name in ("max_steps", "num_train_epochs") if name in changes}
    epochs_done = order.epoch(state.step)
    if run.max_steps == max_steps < state.step:
        stop_all(f"--max_steps {max_steps}: must be at least {state.step}, the steps that the run has done")
    if "num_train_epochs" in given and run.num_train_epochs is not None and run.num_train_epochs < epochs_done:
        stop_all(
            f"--num_train_epochs {run.num_train_epochs:g}: must be at least {epochs_done:.2f}, the epochs that the run "
            "has done"
        )
    if run.warmup_steps is not None and run.warmup_steps > max_steps:
        if not run.resume:
            stop_all(f"--warmup_steps {run.warmup_steps}: must be at most {max_steps}, the steps of the run")
        # the saved value may come from an earlier, longer run
        run = replace(run, warmup_steps=max_steps)
    return replace(arguments, run=run.of_length(max_steps))


def reason_to_end(run: RunArguments, state: TrainerState) -> str | None:
    """Return the reason why a run with this state has no step left, or None if training goes on."""
    if state.evaluated_step != state.step:
        return None
    if state.step >= run.max_steps:
        return f"all {run.max_steps} steps are done; give a larger --max_steps or --num_train_epochs to go on"
    if run.patience and state.n_worse >= run.patience:
        return f"{state.n_worse} evaluations were not better; give --patience 0 or a larger number to go on"
    return None


def default_epochs(data: DataArguments) -> float | None:
    """Return the default of `--num_train_epochs`, or None for the embedded corpus, which has a default of steps."""
    return N_EPOCHS if data.train_file or data.dataset != EMBEDDED else None


def _n_steps(arguments: Arguments, order: DocumentOrder) -> int:
    run = arguments.run
    if run.max_steps != NOT_GIVEN["max_steps"]:
        return run.max_steps
    n_epochs = run.num_train_epochs or default_epochs(arguments.data)
    if n_epochs is None:
        return N_EMBEDDED_STEPS
    return order.steps_to_read(max(1, round(n_epochs * len(order.n_segments))))
