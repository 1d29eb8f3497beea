"""Models trained on documents and compared."""
