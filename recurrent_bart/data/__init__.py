"""Documents with their targets: sources, tokenisation, batches."""
