"""Inference: a reader for a text that arrives in parts, and a summarizer for many texts."""
