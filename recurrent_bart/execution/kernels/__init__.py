"""Triton kernels for what surrounds the matrix products of several encoder layers at once; on a GPU alone."""
