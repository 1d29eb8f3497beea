"""Synthetic tasks that a model solves only if it remembers earlier segments."""
