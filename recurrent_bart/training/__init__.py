"""Our own loop over a DeepSpeed engine, and what it needs."""
