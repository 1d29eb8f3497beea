"""Faster computation of the encoder with equal results: schedules, stacked layers, kernels and CUDA graphs."""
