"""Recurrence in plain PyTorch: state, prefix, cell and segmentation."""
