"""Descriptions of all fields of `metrics.jsonl`.

wandb and TensorBoard receive the same fields. Each line of `metrics.jsonl` is a JSON object with `step` and the fields
of one group below. Unknown and non-finite values are left out.
A list has one number per rank or layer. A table has one row per layer and one column per segment.
"""

# Logged every `--log_every` steps and before an evaluation. The values cover all steps since the previous log line.
STEPS = {
    "loss": "training loss: cross-entropy per target token, in nats, over all ranks",
    "loss_max": "largest training loss of a rank, in nats per target token",
    "learning_rate": "learning rate of the backbone (BART's own parameters) in the last step",
    "gradient_norm": "gradient norm of all parameters in the last step, before clipping",
    "gradient_norm_backbone": "gradient norm of BART's own parameters in the last step, before clipping",
    "gradient_norm_recurrence": "gradient norm of the recurrence's parameters in the last step, before clipping",
    "tokens_per_second": "document tokens read per second, all ranks together",
    "tokens_per_second_per_device": "document tokens read per second, mean per rank",
    "model_flops_share": "model FLOPs utilisation, 0 to 1: useful FLOP/s over the peak FLOP/s of all devices; "
    "recomputed activations do not count. Left out if above 1: a measured peak is too low if other processes use the "
    "device",
    "step_seconds": "wall-clock time of an optimizer step, in seconds, mean",
    "data_seconds": "time per step spent waiting for batches, in seconds, mean over ranks",
    "forward_seconds": "time per step in forward passes, in seconds, mean over ranks",
    "backward_seconds": "time per step in backward passes, waiting for other ranks' gradients included, in seconds, "
    "mean over ranks",
    "optimizer_seconds": "time per step in the optimizer update, in seconds, mean over ranks",
    "rank_seconds": "list by rank: time per step in data loading and forward passes, before ranks wait, in seconds",
    "slowest_rank": "rank with the largest value of rank_seconds",
    "slowest_host": "host name of the slowest rank",
    "slowest_seconds": "value of rank_seconds for the slowest rank, in seconds",
    "fastest_rank": "rank with the smallest value of rank_seconds",
    "fastest_host": "host name of the fastest rank",
    "fastest_seconds": "value of rank_seconds for the fastest rank, in seconds",
    "memory_allocated_bytes": "peak memory of the rank with the most, in bytes: GPU memory of tensors; on CPU, "
    "memory of the process",
    "memory_reserved_bytes": "peak memory reserved by the GPU allocator, in bytes, on the rank with the most; 0 on CPU",
    "memory_retries": "number of allocator retries after a failed allocation, since the start, summed over ranks",
    "segments_per_document": "mean number of segments per document read",
    "n_cut_documents": "number of training documents longer than --max_n_segments, which are cut",
    "n_bad_documents": "number of unusable training documents skipped by --skip_bad_samples",
    "n_skipped": "number of skipped optimizer steps (loss or gradient not finite) since the start",
    "seconds_left": "estimated time until the last step, in seconds",
    "gold_probability": "with --oracle: probability (0 to 1) that the decoder reads the target's token",
    "curriculum_segments": "with --curriculum: current maximum number of segments of a document",
}
# Scores of generated texts, without models: means over texts. Not at step 0. Of several targets, the best counts for
# each ROUGE score, and the mean for each other score. N-grams are of words.
SCORES = {
    "rouge1": "ROUGE-1: F-measure of words, or of characters in scripts without spaces, in percent",
    "rouge2": "ROUGE-2: F-measure of bigrams of these words or characters, in percent",
    "rougeL": "ROUGE-L: F-measure of the longest common subsequence of the whole texts, in percent",
    "rougeLsum": "ROUGE-Lsum: F-measure of longest common subsequences by sentence, in percent",
    "repeated_4grams": "4-grams of the text that repeat an earlier one, in percent",
    "target_repeated_4grams": "4-grams of the target that repeat an earlier one, in percent",
    "novel_1grams": "words of the text that are not in the source, in percent",
    "novel_2grams": "bigrams of the text that are not in the source, in percent",
    "novel_4grams": "4-grams of the text that are not in the source, in percent",
    "target_novel_1grams": "words of the target that are not in the source, in percent",
    "target_novel_2grams": "bigrams of the target that are not in the source, in percent",
    "target_novel_4grams": "4-grams of the target that are not in the source, in percent",
    "coverage": "words of the text in fragments copied from the source, in percent",
    "density": "length of the copied fragment of a word of the text, in words, mean",
    "n_words": "length of the text, in words",
    "n_target_words": "length of the target, in words",
    "length_ratio": "length of the text over length of the target, mean over texts",
}
# Further scores of generated texts if Japanese texts are segmented into words.
WORD_SCORES = {
    f"rouge{kind}_words": f"ROUGE-{kind} of the word segmenter's words: F-measure, in percent"
    for kind in ("1", "2", "L", "Lsum")
}
# Logged at each evaluation on the validation split.
EVALUATIONS = {
    "validation_loss": "validation loss: cross-entropy per target token, in nats",
    **SCORES,
    "evaluation_seconds": "duration of the evaluation, in seconds",
    "prefix_gate": "list by layer: opening of the gate on the prefix, mean over heads",
    "update_gate": "list by layer: opening of the gate on the state update, mean over elements",
    "prefix_mass": "table: share of the tokens' attention that goes to the prefix, 0 to 1",
    "prefix_size": "table: norm of the attention output from the prefix over norm of the attention output from tokens",
    "state_norm": "table: norm of a state position after the segment, mean over positions",
    "state_change": "table: norm of the state's change in the segment over the state's norm before the segment",
    "gradient_by_distance": "list by distance from the target, in segments: gradient norm of the segment's embeddings",
}
# Logged for an optimizer step that was not applied.
SKIPS = {"skipped": "reason for the skipped optimizer step"}
# Logged after each checkpoint.
CHECKPOINTS = {"checkpoint_seconds": "time that training waited for the checkpoint, in seconds"}

FIELDS = {"step": "number of optimizer steps done", **STEPS, **EVALUATIONS, **WORD_SCORES, **SKIPS, **CHECKPOINTS}
