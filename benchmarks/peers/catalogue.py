"""Who is compared, what each needs, and in which ways each is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

TORCH = "torch"
PILLOW = "pillow"
# Both, at most: shuffled to the last record, and as the library itself would shuffle.
ALL = ("none", "full", "default")
# Forms of decoded pictures beside the usual one: by libjpeg-turbo's faster and less exact transform, which FFCV has no
# way around, so that rows of the same work stand beside each other; and, with it, resized as planes before they become
# RGB, the fastest way that tiercache has. FFCV is run once more beside each.
FAST_DCT = "fast DCT"
PLANES = "planes and fast DCT"
PICTURE_FORMS = (FAST_DCT, PLANES)


def manner(form: str) -> str:
    """The form of a row in words, as "as list" or "by fast DCT"; "" where it has none."""
    return f"by {form}" if form in PICTURE_FORMS else form and f"as {form}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A contender.

    Attributes:
        title: its name for people.
        distribution: whose version is reported; "": none.
        requirements: for pip, in an environment of its own; none: the interpreter that runs the comparison.
        system: pkg-config modules that building it needs.
        shuffles: the orders it has, of "none", "full" and "default".
        tuned: whether the best number of workers is looked for once a workload; or for each order of it, where those
            are read in different ways; or never, since it has none.
        min_workers: it cannot do with fewer.
        forms: what it gives for columns of varied length.
        picture_forms: of decoded pictures, those that it has beside its usual one, or that its usual one is.
        workloads: names of those that it is run on.
        fewer: by workload, the most records of it that it gets, the first ones, where all of them would take minutes.
        baseline: no library, but something that libraries are measured against.
        packs: whether it has a format, and so a way to write it.
    """

    title: str
    distribution: str = ""
    requirements: tuple[str, ...] = ()
    system: tuple[str, ...] = ()
    shuffles: tuple[str, ...] = ("none", "full")
    tuned: Literal["once", "orders", "never"] = "once"
    min_workers: int = 0
    forms: tuple[str, ...] = ("list",)
    picture_forms: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ("tokens", "bytes", "tensors", "rows", "images")
    fewer: Mapping[str, int] = field(default_factory=dict)
    baseline: bool = False
    packs: bool = True


BOTH = ("list", "buffer")

PEERS = {
    "tiercache": Peer(title="tiercache", shuffles=ALL, tuned="never", forms=BOTH, picture_forms=PICTURE_FORMS),
    "torch_map": Peer(title="torch DataLoader, in memory", distribution="torch"),
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
    "mosaic": Peer(
        title="MosaicML Streaming",
        distribution="mosaicml-streaming",
        requirements=("numpy", "mosaicml-streaming==0.13.0", TORCH, PILLOW),
        shuffles=ALL,
        # It packs 34 to 55 thousand a second, two million in up to a minute, and reads 12 to 20 thousand.
        fewer={"rows": 131_072},
    ),
    "lit": Peer(
        title="LitData",
        distribution="litdata",
        requirements=("numpy", "litdata==0.2.76", TORCH, PILLOW),
        shuffles=ALL,
        # It packs 40 to 71 thousand a second, two million in up to a minute. In the stored order it reads 71 to 118
        # thousand: with less than these an epoch would be no longer than a span.
        fewer={"rows": 262_144},
    ),
    "wds": Peer(
        title="WebDataset",
        distribution="webdataset",
        requirements=("numpy", "webdataset==1.0.2", TORCH, PILLOW),
        shuffles=("none", "default"),
        # It packs 2.4 to 4 thousand a second, 6 KB of tar each: two million in nine minutes or more, and 12 GB.
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
            "ffcv==1.0.2",
        ),
        system=("opencv4", "libturbojpeg"),
        min_workers=1,
        forms=BOTH,
        picture_forms=PICTURE_FORMS,
    ),
    "grain_ar": Peer(
        title="Grain + ArrayRecord",
        distribution="grain",
        requirements=("numpy", "grain==0.2.18", "array-record==0.8.6", TORCH, PILLOW),
        # The first batch of two million took more than five minutes, of 131,072 10 s.
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
}

# Not compared: it draws.
PLOTS = Peer(title="plots", requirements=("matplotlib",))
