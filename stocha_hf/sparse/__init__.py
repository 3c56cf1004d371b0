"""Sparse decode: kernels.cpp for the CPU, build.py compiles it, ops.py makes torch operators of it."""
