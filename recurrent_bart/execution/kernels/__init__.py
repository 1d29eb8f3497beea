"""Triton kernels for the operations around the matrix products of several encoder layers; GPU only."""
