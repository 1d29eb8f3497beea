"""Measurements of what a model reads from its state."""
