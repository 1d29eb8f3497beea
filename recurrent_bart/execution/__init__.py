"""The same numbers, faster: schedules, stacked layers, kernels and CUDA graphs."""
