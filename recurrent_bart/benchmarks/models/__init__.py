"""Benchmark of the speed and memory of Recurrent BART and of other models."""
