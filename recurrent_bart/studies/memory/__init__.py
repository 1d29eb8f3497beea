"""Small models trained on memory tasks, many on one GPU."""
