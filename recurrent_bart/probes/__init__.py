"""Measurements of how much a model uses its state."""
