"""Sparse decoding: C++ kernels for CPUs, Triton kernels for GPUs, and how a model finds them."""
