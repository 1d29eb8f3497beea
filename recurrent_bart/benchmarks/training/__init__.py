"""Speed of the training loop on several processes."""
