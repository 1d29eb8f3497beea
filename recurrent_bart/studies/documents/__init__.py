"""Studies on documents: training and comparison of models."""
