"""Checkpoints of a run: written atomically, checked by checksums, loaded without running code from their files."""
