"""Probes of the recurrence at each evaluation, always on the same validation documents."""

from typing import Any

from recurrent_bart.distributed import from_first, is_first
from recurrent_bart.evaluation.evaluator import Evaluator
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.probes.recurrence_metrics import recurrence_metrics
from recurrent_bart.training.tracking import warn

N_DOCUMENTS = 2


def probe_recurrence(model: RecurrentBartForConditionalGeneration, evaluator: Evaluator) -> dict[str, Any]:
    """Return the metrics of `recurrence_metrics` on every rank. Rank 0 computes them while all other ranks wait.

    The metrics use the `N_DOCUMENTS` longest documents. `model` must be unsharded and in evaluation mode.
    """
    return from_first(_probe(model, evaluator) if is_first() else None)


def _probe(model: RecurrentBartForConditionalGeneration, evaluator: Evaluator) -> dict[str, Any]:
    plan = evaluator.plan
    longest = sorted(zip(plan.n_segments, plan.indices, strict=True), key=lambda pair: (-pair[0], pair[1]))
    documents = []
    for _, index in longest[:N_DOCUMENTS]:
        batch = evaluator.collator([{**evaluator.corpus[index], "index": index}])
        inputs = batch.model_inputs(evaluator.device)
        documents.append((inputs["input_ids"], inputs["attention_mask"], inputs["labels"]))
    # all other ranks wait for rank 0; a failed metric must not end the run
    try:
        return recurrence_metrics(model, documents)
    except Exception as error:
        warn(f"the metrics of the recurrence could not be computed: {' '.join(str(error).split())}")
        return {}
