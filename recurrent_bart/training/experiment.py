"""Start of a run: folder, documents, model, engine and session; `launch/train.py` calls `run_experiment`."""

from pathlib import Path
from typing import TypeVar

import torch

from recurrent_bart.checkpointing.checkpoints import Checkpoints, Resumed
from recurrent_bart.checkpointing.process_state import reseed_random_states
from recurrent_bart.distributed import (
    first_then_all,
    from_first,
    is_first,
    only_first,
    run_on_all_ranks,
)
from recurrent_bart.model.generation_settings import change_settings
from recurrent_bart.monitoring.progress import say
from recurrent_bart.run_folder import RunFolder
from recurrent_bart.training.adapters import choose_trained
from recurrent_bart.training.arguments import Arguments
from recurrent_bart.training.description import generated_length, learning_rates
from recurrent_bart.training.document_order import build_order
from recurrent_bart.training.environment import Environment, batch_job
from recurrent_bart.training.lifecycle.exit_codes import AlreadyFinished, is_done
from recurrent_bart.training.lifecycle.run_lock import Holder, RunLock
from recurrent_bart.training.model_building import build_model, force_target_language
from recurrent_bart.training.optimization import build_optimizer, build_scheduler
from recurrent_bart.training.preparation import make_run_folder, prepare
from recurrent_bart.training.run_length import reason_to_end, with_length
from recurrent_bart.training.session import OUTCOME_FILE, Session
from recurrent_bart.training.zero.engine import build_engine

AnySession = TypeVar("AnySession", bound="Session")


def run_experiment(arguments: Arguments, environment: Environment) -> Path:
    """Train, evaluate and save. Return the run folder.

    Raises:
        Interrupted: The run was asked to stop early. A checkpoint of its last step exists.
        ValueError: An argument or a document is wrong.
    """
    try:
        with open_session(arguments, environment, Session) as session:
            session.train()
    except AlreadyFinished as notice:
        if is_first():
            say(f"finished   {notice}")
    # set on every rank when the folder is locked
    return Path(arguments.run.output_dir or "")


def open_session(arguments: Arguments, environment: Environment, kind: type[AnySession]) -> AnySession:
    """Lock the run folder and build a session: documents, model, engine, and the checkpoint of a resumed run.

    The caller must enter the session, which is an instance of the class `kind`.

    Raises:
        ValueError: An argument or a document is wrong, or another run trains in the folder.
        AlreadyFinished: The resumed run is finished.
    """
    lock = lock_folder(arguments)
    try:
        return _open_locked(arguments, environment, kind, lock)
    except BaseException:
        lock.abandon()
        raise


def lock_folder(arguments: Arguments) -> RunLock:
    """Create and lock the run folder on rank 0. Set `output_dir` on every rank.

    Raises:
        ValueError: The folder holds a run, is locked by another run, or cannot be written.
    """
    run, holder = arguments.run, Holder.here(*batch_job())
    locks: list[RunLock] = []

    def lock() -> None:
        folder, made = (RunFolder(Path(run.resume)), []) if run.resume else make_run_folder(arguments)
        locks.append(RunLock(folder.path, holder, made, say))
        try:
            locks[0].acquire()
        except ValueError:
            locks[0].abandon()
            raise

    only_first(lock)
    run.output_dir = from_first(str(locks[0].folder) if locks else None)
    return locks[0] if locks else RunLock(Path(run.output_dir or ""), holder)


def _open_locked(arguments: Arguments, environment: Environment, kind: type[AnySession], lock: RunLock) -> AnySession:
    run = arguments.run
    prepared = first_then_all(lambda: prepare(arguments, environment))
    checkpoints = Checkpoints(
        prepared.folder.checkpoints, run.keep_last, run.keep_every, run.async_save, run.trust_checkpoint
    )
    newest = checkpoints.find_newest() if run.resume else None
    state = checkpoints.read_state(newest)
    order = build_order(arguments, prepared, environment.world_size, state)
    arguments = with_length(arguments, order, state, prepared.changes)
    run = arguments.run
    reason = reason_to_end(run, state)
    if run.resume and reason and from_first(is_first() and is_done(prepared.folder.path / OUTCOME_FILE)):
        raise AlreadyFinished(f"{reason}; the folder of the run is unchanged")
    model = run_on_all_ranks(lambda: build_model(arguments.model, prepared.config, run.seed))
    force_target_language(model, prepared.tokenizer)
    choose_trained(model, arguments.model)
    change_settings(model.generation_config, run.generation_settings(), generated_length(run, prepared))
    rates = learning_rates(arguments, prepared.config)
    optimizer = build_optimizer(model, rates, run.weight_decay, run.adam_beta2)
    engine = build_engine(model, optimizer, build_scheduler(optimizer, run), prepared.deepspeed)
    # from here on, each rank draws its own dropout masks
    torch.manual_seed(run.seed + 1 + environment.rank)
    model.set_gradient_checkpointing(run.gradient_checkpointing)
    resumed = Resumed(state) if newest is None else checkpoints.load(engine, newest)
    if "seed" in prepared.changes:
        # replace the checkpoint's random states, which come from the seed before the change
        torch.manual_seed(run.seed + 1 + environment.rank)
        reseed_random_states(resumed.state.step)
    return kind(arguments, environment, prepared, engine, checkpoints, resumed, order, lock)
