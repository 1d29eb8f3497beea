"""Document order of a run: which documents each step reads, from the flags and the trainer state."""

from dataclasses import astuple, replace

from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.data.batches import BatchOrder, DocumentOrder, SegmentSizes
from recurrent_bart.data.token_batches import TokenBatchOrder
from recurrent_bart.distributed import stop_all
from recurrent_bart.training.arguments import Arguments
from recurrent_bart.training.preparation import Documents, Preparation
from recurrent_bart.training.run_arguments import RunArguments

# number of steps over which the share of padding is measured
N_PADDING_STEPS = 50
# flags of the fields of SegmentSizes
SIZE_FLAGS = ("segment_size", "input_size", "max_n_segments")


def build_order(arguments: Arguments, prepared: Preparation, world_size: int, state: TrainerState) -> DocumentOrder:
    """Build the order of the training documents, starting at the position that the trainer state stores.

    Raises:
        ValueError: `--tokens_per_batch` is given and the run began with batches of a fixed number of documents, or a
            resumed run would read other documents.
    """
    run, n_segments = arguments.run, order_lengths(arguments, prepared.splits["train"], state)
    if state.step == 0:
        state.order_seed = run.seed
    if run.tokens_per_batch is None:
        return by_documents(run, n_segments, world_size, state)
    if state.order_batch:
        stop_all(f"--tokens_per_batch {run.tokens_per_batch}: the run was started without this flag; remove the flag")
    # RecurrentBartConfig fills the default
    assert prepared.config.input_size is not None
    return TokenBatchOrder(
        n_segments,
        most=run.tokens_per_batch // prepared.config.input_size,
        n_batches=run.gradient_accumulation_steps * world_size,
        seed=order_seed(run, state),
        first_step=state.step,
        first_document=state.n_documents,
        first_most=state.order_segments or None,
    )


def order_lengths(arguments: Arguments, documents: Documents, state: TrainerState) -> list[int]:
    """Return the documents' numbers of segments when the run began, which its order is built from.

    Raises:
        ValueError: A resumed run has other segments, and other documents with targets or batches of a number of tokens.
    """
    now = list(astuple(documents.collator.sizes))
    if state.step == 0:
        state.order_sizes = now
    # older checkpoints do not store the sizes
    if state.order_sizes in ([], now):
        return documents.plan.n_segments
    flags = " or ".join(
        f"--{name}" for name, *values in zip(SIZE_FLAGS, state.order_sizes, now, strict=True) if len({*values}) > 1
    )
    then = replace(documents.collator, sizes=SegmentSizes(*state.order_sizes)).plan(documents.corpus)
    if then.indices != documents.plan.indices:
        stop_all(
            f"{flags}: {len(then.indices)} documents had a target in the part that was read, now "
            f"{len(documents.plan.indices)} have; a resumed run reads the same documents. Remove the flag, or start a "
            "new run with --model_name_or_path"
        )
    if arguments.run.tokens_per_batch is not None:
        stop_all(
            f"{flags}: with --tokens_per_batch the batches of an epoch depend on it; remove the flag, lower "
            "--tokens_per_batch instead, or start a new run with --model_name_or_path"
        )
    return then.n_segments


def by_documents(run: RunArguments, n_segments: list[int], world_size: int, state: TrainerState) -> BatchOrder:
    """Build an order with a fixed number of documents per step."""
    return BatchOrder(
        n_segments,
        run.per_device_train_batch_size * run.gradient_accumulation_steps * world_size,
        order_seed(run, state),
        unit=state.order_batch or None,
        first_step=state.step,
        first_document=state.n_documents,
    )


def order_seed(run: RunArguments, state: TrainerState) -> int:
    """Return the seed of the document order. Another seed would read documents of the current epoch again."""
    return run.seed if state.order_seed is None else state.order_seed


def store_data_position(order: DocumentOrder, state: TrainerState) -> None:
    """Store in the trainer state the position from which `build_order` continues."""
    state.n_documents = order.documents_before(state.step)
    if isinstance(order, TokenBatchOrder):
        state.order_segments = order.most_segments(state.step)
    if isinstance(order, BatchOrder):
        state.order_batch = order.unit


def describe_data_order(
    arguments: Arguments, prepared: Preparation, world_size: int, order: DocumentOrder
) -> list[str]:
    """Return log lines that state the documents or tokens per step, with the share of padding."""
    run = arguments.run
    parts = f"x {run.gradient_accumulation_steps} accumulated x {world_size} processes"
    times = f"{order.epoch(run.max_steps):.1f} epochs, evaluated every {run.eval_every} steps"
    padding = f"padding    {_padding(run, world_size, order)} of the computed segments hold no text"
    if not isinstance(order, TokenBatchOrder):
        n_device = run.per_device_train_batch_size
        n_documents = n_device * run.gradient_accumulation_steps * world_size
        return [
            f"steps      {run.max_steps} of {n_documents} documents = {n_device} per device {parts}; {times}",
            padding,
        ]
    n_segments = prepared.splits["train"].plan.n_segments
    without = _padding(run, world_size, by_documents(run, n_segments, world_size, TrainerState()))
    return [
        f"steps      {run.max_steps} of up to {run.tokens_per_batch} tokens per device {parts}; {times}; "
        f"{sum(n > order.most for n in n_segments)} documents have more, each in a separate batch",
        f"{padding}; {without} in batches of {run.per_device_train_batch_size} documents",
    ]


def _padding(run: RunArguments, world_size: int, order: DocumentOrder) -> str:
    n_steps = min(N_PADDING_STEPS, run.max_steps)
    return f"{100 * order.padding(n_steps, world_size, run.gradient_accumulation_steps):.1f} %"
