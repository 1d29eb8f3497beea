"""Synthetic tasks that only memory solves."""
