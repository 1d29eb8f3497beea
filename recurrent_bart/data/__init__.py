"""Documents with their targets: where they come from, how they are tokenised, how they are batched."""
