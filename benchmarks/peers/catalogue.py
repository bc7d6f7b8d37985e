"""The compared libraries, their requirements, and the ways in which each one is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

TORCH = "torch"
PILLOW = "pillow"
PYARROW = "pyarrow"  # reads the table that all packers pack
# At most both: shuffled fully, and with the library's own default shuffle.
ALL = ("none", "full", "default")
# Layouts of decoded pictures besides the usual one: with libjpeg-turbo's faster and less exact transform, which FFCV
# always uses, so that rows of the same work can be compared. FFCV is run again next to it.
FAST_DCT = "fast DCT"
PICTURE_FORMS = (FAST_DCT,)


WORKLOADS = ("tokens", "bytes", "tensors", "rows", "images")
AUGMENTED = "augmented"
# The first epoch of a data set in an S3 store; only contenders that read stores run it.
COLD = "cold"


def manner(form: str) -> str:
    """Return the layout of a row in words, such as "as list" or "by fast DCT"; "" if it has none."""
    return f"by {form}" if form in PICTURE_FORMS else form and f"as {form}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A contender.

    Attributes:
        title: Name in the output.
        distribution: Distribution whose version is reported, or "".
        requirements: Requirements for pip, in an environment of its own; none: the interpreter of the comparison.
        environment: Name of its environment, which contenders with the same requirements share; "": its own name.
        system: pkg-config modules that its build needs.
        shuffles: The orders that it supports, of "none", "full" and "default".
        tuned: Whether the best number of workers is searched once per workload, once per order (if orders are read in
            different ways), or never (without workers).
        min_workers: Minimum number of workers.
        forms: Layouts of columns of varying length.
        picture_forms: Layouts of decoded pictures besides its usual one, or which its usual one is.
        workloads: Names of the workloads that it is run on.
        fewer: By workload, the maximum number of records, if all records would take minutes.
        baseline: Whether it is a baseline and not a library.
        packs: Whether it has a format of its own, and so a way to write it.
    """

    title: str
    distribution: str = ""
    requirements: tuple[str, ...] = ()
    environment: str = ""
    system: tuple[str, ...] = ()
    shuffles: tuple[str, ...] = ("none", "full")
    tuned: Literal["once", "orders", "never"] = "once"
    min_workers: int = 0
    forms: tuple[str, ...] = ("list",)
    picture_forms: tuple[str, ...] = ()
    workloads: tuple[str, ...] = WORKLOADS
    fewer: Mapping[str, int] = field(default_factory=dict)
    baseline: bool = False
    packs: bool = True


BOTH = ("list", "buffer")
S3FS = ("numpy", "s3fs==2026.9.0", TORCH)

PEERS = {
    "tiercache": Peer(
        title="tiercache",
        shuffles=ALL,
        tuned="never",
        forms=BOTH,
        picture_forms=PICTURE_FORMS,
        workloads=(*WORKLOADS, AUGMENTED, COLD),
    ),
    "torch_map": Peer(title="torch DataLoader, in memory", distribution="torch", workloads=(*WORKLOADS, AUGMENTED)),
    "torch_bulk": Peer(
        title="torch DataLoader, in bulk",
        distribution="torch",
        workloads=("tokens", "bytes", "tensors", "rows"),
    ),
    "numpy_memmap": Peer(title="numpy memmap, by hand", distribution="numpy", tuned="never", forms=BOTH, baseline=True),
    "c_floor": Peer(
        title="C floor", tuned="never", forms=BOTH, workloads=("tokens", "bytes", "tensors", "rows"), baseline=True
    ),
    "decoder_alone": Peer(
        title="decoder and resize alone",
        distribution="simplejpeg",
        requirements=("numpy", "simplejpeg==1.9.0", "opencv-python-headless==5.0.0.93", TORCH),
        tuned="never",
        picture_forms=PICTURE_FORMS,
        workloads=("images",),
        baseline=True,
    ),
    "transforms_alone": Peer(
        title="decoder and transforms alone",
        tuned="never",
        picture_forms=PICTURE_FORMS,
        workloads=(AUGMENTED,),
        baseline=True,
        packs=False,
    ),
    "mosaic": Peer(
        title="MosaicML Streaming",
        distribution="mosaicml-streaming",
        requirements=("numpy", "mosaicml-streaming==0.13.0", TORCH, PILLOW, PYARROW),
        shuffles=ALL,
        workloads=(*WORKLOADS, COLD),
        # It packs 34 to 55 thousand records/s, two million in up to a minute, and reads 12 to 20 thousand.
        fewer={"rows": 131_072},
    ),
    "lit": Peer(
        title="LitData",
        distribution="litdata",
        requirements=("numpy", "litdata==0.2.76", TORCH, PILLOW, PYARROW),
        shuffles=ALL,
        workloads=(*WORKLOADS, COLD),
        # It packs 40 to 71 thousand records/s, two million in up to a minute. In the stored order it reads 71 to 118
        # thousand: with fewer records than these, an epoch would be shorter than a span.
        fewer={"rows": 262_144},
    ),
    "wds": Peer(
        title="WebDataset",
        distribution="webdataset",
        requirements=("numpy", "webdataset==1.0.2", TORCH, PILLOW, PYARROW),
        shuffles=("none", "default"),
        workloads=(*WORKLOADS, COLD),
        # It packs 2.4 to 4 thousand records/s, 6 KB of tar each: two million take nine minutes or more, and 12 GB.
        fewer={"rows": 65_536},
    ),
    "beton": Peer(
        title="FFCV",
        distribution="ffcv",
        requirements=(
            "setuptools",
            "numpy<2",
            TORCH,
            "opencv-python-headless<4.12",
            "numba<0.62",
            PILLOW,
            PYARROW,
            "ffcv==1.0.2",
        ),
        system=("opencv4", "libturbojpeg"),
        min_workers=1,
        forms=BOTH,
        picture_forms=PICTURE_FORMS,
        workloads=(*WORKLOADS, AUGMENTED),
    ),
    "grain_ar": Peer(
        title="Grain + ArrayRecord",
        distribution="grain",
        requirements=("numpy", "grain==0.2.18", "array-record==0.8.6", TORCH, PILLOW, PYARROW),
        # The first batch of two million records took more than five minutes, of 131,072 records 10 s.
        fewer={"rows": 65_536},
    ),
    "lance_arrow": Peer(
        title="Lance",
        distribution="pylance",
        requirements=("numpy", "pylance==14.0.2", TORCH, PILLOW),
        tuned="orders",
        forms=BOTH,
    ),
    "spdl_threads": Peer(
        title="SPDL",
        distribution="spdl",
        requirements=("numpy", "spdl==0.8.0", TORCH, PILLOW),
        forms=BOTH,
        min_workers=1,
        packs=False,
    ),
    "hf": Peer(
        title="Hugging Face datasets",
        distribution="datasets",
        requirements=("numpy", "datasets==5.2.0", TORCH, PILLOW),
        tuned="orders",
        forms=BOTH,
    ),
    "s3_connector": Peer(
        title="s3torchconnector",
        distribution="s3torchconnector",
        requirements=("numpy", "s3torchconnector==1.5.0", TORCH),
        workloads=(COLD,),
    ),
    "s3fs_map": Peer(
        title="s3fs, record by record",
        distribution="s3fs",
        requirements=S3FS,
        environment="s3fs",
        workloads=(COLD,),
    ),
    "s3fs_bulk": Peer(
        title="s3fs, in bulk",
        distribution="s3fs",
        requirements=S3FS,
        environment="s3fs",
        workloads=(COLD,),
    ),
    "obstore_floor": Peer(
        title="obstore to disk",
        distribution="obstore",
        shuffles=("none",),
        tuned="never",
        workloads=(COLD,),
        baseline=True,
    ),
}

# Only its packer is compared: its loader is a part of its training.
MEGATRON = Peer(
    title="Megatron-LM", distribution="megatron-core", requirements=("numpy", TORCH, "megatron-core==0.16.1")
)

# Not compared: for the plots.
PLOTS = Peer(title="plots", requirements=("matplotlib",))
