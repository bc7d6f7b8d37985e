"""The Cython faces of the C kernels in csrc/; each module has a .pyi that is its contract."""
