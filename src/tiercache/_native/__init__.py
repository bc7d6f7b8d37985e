"""Cython modules over the C kernels in csrc/. The .pyi file of each module is its contract."""
