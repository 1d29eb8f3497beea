"""What the lines of `metrics.jsonl` hold, and so what wandb and TensorBoard are told.

Each line is an object with a `step`, the number of optimizer steps done, and the figures of one kind. What is not
known or not finite is left out. Tables are lists of rows, one row a layer, one number a segment.
"""

# every `--log_every` steps and before an evaluation, over all steps since the last such line
STEPS = {
    "loss": "cross-entropy per target token",
    "loss_max": "that of the process where it is largest",
    "learning_rate": "of the backbone in the last step",
    "gradient_norm": "of the last step, before clipping",
    "gradient_norm_backbone": "the part of BART's own parameters",
    "gradient_norm_recurrence": "the part of the recurrence's",
    "tokens_per_second": "document tokens read by all processes",
    "tokens_per_second_per_device": "by each",
    "model_flops_share": "useful arithmetic over what the devices could do; recomputing is not useful. Left out if "
    "it is more than 1: a peak that no maker states is measured, and too low while other processes use the device",
    "step_seconds": "of a step, all in all",
    "data_seconds": "of a step, waiting for batches; mean over processes, as the next three",
    "forward_seconds": "of a step, in forward passes",
    "backward_seconds": "of a step, in backward passes and in waiting for other processes' gradients",
    "optimizer_seconds": "of a step, in the update",
    "rank_seconds": "list by process: of a step, in data and forward passes, before it meets the others",
    "slowest_rank": "process of the largest of these",
    "slowest_host": "its machine",
    "slowest_seconds": "its figure",
    "fastest_rank": "process of the smallest",
    "fastest_host": "its machine",
    "fastest_seconds": "its figure",
    "memory_allocated_bytes": "peak of the process with the most: a GPU's tensors; without one, of the process",
    "memory_reserved_bytes": "peak held by the GPU's allocator; 0 without one",
    "memory_retries": "times that allocators had to give memory back first, summed over processes since the start",
    "segments_per_document": "of the documents read",
    "n_cut_documents": "training documents that are longer than --max_n_segments",
    "n_bad_documents": "training documents that --skip_bad_samples passed over",
    "n_skipped": "steps that were not applied since the start",
    "seconds_left": "until --max_steps",
    "gold_probability": "with --oracle: share of the words that the decoder reads that are the target's",
    "curriculum_segments": "with --curriculum: the most segments of a document that are read",
}
# at each evaluation
EVALUATIONS = {
    "validation_loss": "cross-entropy per target token",
    "rouge1": "F-measure, as the next three; not at step 0",
    "rouge2": "",
    "rougeL": "",
    "rougeLsum": "",
    "evaluation_seconds": "that it took",
    "prefix_gate": "list by layer: opening of the gate on the prefix, mean over heads",
    "update_gate": "list by layer: opening of the gate on the update of the state, mean over its elements",
    "prefix_mass": "table: share of the tokens' attention that goes to the prefix",
    "prefix_size": "table: norm of what tokens read from the prefix, over that of what they read from tokens",
    "state_norm": "table: norm of a position of the state after the segment, mean over positions",
    "state_change": "table: norm of its change by the segment, over its norm before",
    "gradient_by_distance": "list by distance in segments from the target: norm of the gradient by the embeddings",
}
# a step that was not applied
SKIPS = {"skipped": "why"}
# after each checkpoint
CHECKPOINTS = {"checkpoint_seconds": "that training waited for it"}

FIELDS = {"step": "optimizer steps done", **STEPS, **EVALUATIONS, **SKIPS, **CHECKPOINTS}
