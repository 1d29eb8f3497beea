"""Benchmark of text generation: this package's loop over tokens beside Hugging Face's."""
