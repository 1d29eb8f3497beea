"""Logging of a run: metrics, progress display, wandb and TensorBoard."""
