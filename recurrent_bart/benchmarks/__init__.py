"""Benchmarks of the speed, memory and FLOPs of Recurrent BART and of other long-document models."""
