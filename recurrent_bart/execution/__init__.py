"""Faster execution with equal results: schedules, stacked layers, kernels and CUDA graphs."""
