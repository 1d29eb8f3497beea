"""Benchmark of the training speed on several processes."""
