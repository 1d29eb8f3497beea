"""Checks of a cluster's nodes before a long run."""
