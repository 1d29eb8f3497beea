"""Speed of training on several processes."""
