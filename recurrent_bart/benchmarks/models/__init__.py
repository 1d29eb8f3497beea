"""Speed and memory of our model and of other models."""
