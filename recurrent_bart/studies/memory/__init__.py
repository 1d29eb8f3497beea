"""Training of small models on memory tasks, many on one GPU."""
