"""Benchmarks: speed, memory and FLOPs of our model and of other long-document models."""
