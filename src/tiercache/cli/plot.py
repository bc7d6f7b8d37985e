"""Plots of simulation results, by policy over cache size. The only module that uses matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiercache.errors import TierCacheError
from tiercache.model import format_bytes

if TYPE_CHECKING:
    from types import ModuleType

FORMATS = (".svg", ".png", ".pdf")
# Colours of the Okabe-Ito palette, which colour-blind readers can distinguish, and markers for greyscale prints.
_LOOKS: dict[str, dict[str, Any]] = {
    "plan": {"color": "#0072B2", "marker": "o"},
    "resident": {"color": "#D55E00", "marker": "s"},
    "s3fifo": {"color": "#009E73", "marker": "^"},
    "lru": {"color": "#CC79A7", "marker": "D"},
    "bound": {"color": "0.25", "linestyle": "--", "zorder": 3},
}


@dataclass(frozen=True, slots=True)
class PlotLine:
    """Results of one policy; the sequences have one element per cache size, sizes ascending.

    Attributes:
        policy: Name of the policy.
        sizes_bytes: Cache sizes.
        hit_ratios: Hit ratios, 0 to 1.
        bytes_per_epoch: Bytes fetched per epoch.
    """

    policy: str
    sizes_bytes: Sequence[int]
    hit_ratios: Sequence[float]
    bytes_per_epoch: Sequence[float]


def load_matplotlib() -> ModuleType:
    """Return the module matplotlib.figure. Raises TierCacheError if it is not installed."""
    try:
        return import_module("matplotlib.figure")
    except ImportError as error:
        raise TierCacheError(
            f"--plot draws with matplotlib, which cannot be imported ({error}): pip install 'tiercache[plot]'"
        ) from error


def check_plot(path: Path | None) -> None:
    """Check that a plot can be drawn, before anything is computed for it.

    Raises:
        ValueError: The file type is not supported, or the folder does not exist.
        TierCacheError: matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--plot takes a file name that ends in {', '.join(FORMATS)}, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot: the folder {path.absolute().parent} does not exist")
    load_matplotlib()


def draw(path: Path, lines: Sequence[PlotLine], *, data_bytes: int, title: str) -> None:
    """Write a plot of the bytes fetched per epoch and of the hit ratio, over cache size.

    Args:
        path: File to write; its suffix selects the format.
        lines: Results, one per policy.
        data_bytes: Bytes of all data that is read; drawn as a dotted line.
        title: Title of the plot.

    Raises:
        ValueError, TierCacheError: See check_plot().
        OSError: The file cannot be written.
    """
    figure = load_matplotlib().Figure(figsize=(9.0, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    fetched, hits = figure.subplots(1, 2)
    most = max((line.sizes_bytes[-1] for line in lines if line.sizes_bytes), default=data_bytes)
    unit, name = _unit(max(most, 1))
    for line in lines:
        sizes = [size / unit for size in line.sizes_bytes]
        look = {"label": line.policy, "markersize": 4} | _LOOKS.get(line.policy, {"marker": "x"})
        fetched.plot(sizes, [n / unit for n in line.bytes_per_epoch], **look)
        hits.plot(sizes, [100 * ratio for ratio in line.hit_ratios], **look)
    _label(fetched, f"fetched per epoch, {name}", name)
    _label(hits, "hit ratio, %", name)
    hits.set_ylim(-2, 102)
    for axes in (fetched, hits):
        axes.axvline(data_bytes / unit, color="0.6", linestyle=":", linewidth=1)
    fetched.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _label(axes: Any, y: str, unit: str) -> None:
    axes.set_xlabel(f"cache size per node, {unit}")
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _unit(n_bytes: int) -> tuple[int, str]:
    """Return the bytes and the name of the unit in which format_bytes() formats a size."""
    name = format_bytes(n_bytes).split()[1]
    return 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(name), name
