"""Messages about documents and targets that are cut to fit the model."""

from collections.abc import Iterator

from recurrent_bart.data.batches import Collator, DocumentPlan


def describe_cuts(split: str, plan: DocumentPlan, collator: Collator) -> Iterator[str]:
    """Yield a log line for each limit that shortens documents or targets: their number, and the flag of the limit."""
    cap = collator.sizes.max_n_segments
    n_documents = len(plan.indices) + plan.n_left_out
    if plan.n_cut:
        yield f"cut        {_share(plan.n_cut, n_documents)} {split} documents after {cap} segments (--max_n_segments)"
    if plan.n_unread_targets:
        yield (
            f"cut        {_share(plan.n_unread_targets, plan.n_targets)} {split} targets with their sections, after "
            f"{cap} segments (--max_n_segments); {plan.n_left_out} documents lose all targets"
        )
    if plan.n_cut_targets:
        n_read = plan.n_targets - plan.n_unread_targets
        yield (
            f"cut        {_share(plan.n_cut_targets, n_read)} {split} targets after {collator.max_target_length} "
            "tokens, special tokens included (--max_target_length)"
        )


def _share(n: int, total: int) -> str:
    return f"{n} of {total} ({100 * n / total:.1f} %)"
