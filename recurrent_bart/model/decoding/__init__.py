"""Fast generation: a decoder with fixed buffers, searches on the device, and CUDA graphs of one step."""
