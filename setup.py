"""Build of the C kernels and their Cython modules; everything else is in pyproject.toml."""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

NATIVE = Path("src/tiercache/_native")
# `make lint` checks our own C with -Wall -Wextra -Werror. The C code that Cython generates compares signed with
# unsigned numbers.
C_FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O3", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wall", "-g0"]

# Extension: its C files. SIMD variants are selected with target attributes, so that the flags stay portable.
SOURCES = {
    "block_builder": [],
    "checksum": ["csrc/crc32c.c", "csrc/sigbus_guard.c"],
    "gather": [
        "csrc/gather.c",
        "csrc/packing.c",
        "csrc/copy.c",
        "csrc/cast.c",
        "csrc/crc32c.c",
        "csrc/sigbus_guard.c",
    ],
    "mapping": [],
    "packing": [
        "csrc/packing.c",
        "csrc/gather.c",
        "csrc/copy.c",
        "csrc/cast.c",
        "csrc/crc32c.c",
        "csrc/sigbus_guard.c",
    ],
    "permute": ["csrc/permute.c"],
    "pixels": ["csrc/pixels.c", "csrc/resize.c"],
    "record_finder": [],
    "ring": [
        "csrc/ring.c",
        "csrc/batch.c",
        "csrc/core_distance.c",
        "csrc/copy_task.c",
        "csrc/slot.c",
        "csrc/permute.c",
        "csrc/dlpack.c",
        "csrc/output_layout.c",
        "csrc/packing.c",
        "csrc/gather.c",
        "csrc/copy.c",
        "csrc/cast.c",
        "csrc/crc32c.c",
        "csrc/sigbus_guard.c",
    ],
    "zstd": ["csrc/zstd_frames.c"],
}

extensions = [
    Extension(
        f"tiercache._native.{name}",
        [str(NATIVE / f"{name}.pyx"), *c_files],
        include_dirs=["csrc"],
        depends=[str(p) for p in Path("csrc").glob("*.h")],
        extra_compile_args=C_FLAGS,
        extra_link_args=["-pthread"],
    )
    for name, c_files in SOURCES.items()
]
setup(
    ext_modules=cythonize(
        extensions,
        compiler_directives={
            "language_level": "3",
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "embedsignature": True,
        },
    )
)
