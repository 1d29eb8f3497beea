"""Checkpoints: write them atomically, find the newest whole one, load it without running code from it."""
