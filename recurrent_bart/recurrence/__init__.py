"""The mathematics of the recurrence in plain PyTorch: state, prefix, cell, segmentation."""
