"""Sparse decode: kernels.cpp for the CPU, build.py compiles it, ops.py calls them, runtime.py uses them in models."""
