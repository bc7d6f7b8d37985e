"""Draws what simulate found: by policy, over the size of the cache. The only file that knows matplotlib."""

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
# Of the Okabe-Ito palette, which colour-blind people can tell apart; each with a marker of its own, for grey paper.
_LOOKS: dict[str, dict[str, Any]] = {
    "plan": {"color": "#0072B2", "marker": "o"},
    "resident": {"color": "#D55E00", "marker": "s"},
    "s3fifo": {"color": "#009E73", "marker": "^"},
    "lru": {"color": "#CC79A7", "marker": "D"},
    "bound": {"color": "0.25", "linestyle": "--", "zorder": 3},
}


@dataclass(frozen=True, slots=True)
class Line:
    """One policy. sizes_bytes, hit_ratios and bytes_per_epoch belong together, sizes rising."""

    policy: str
    sizes_bytes: Sequence[int]
    hit_ratios: Sequence[float]
    bytes_per_epoch: Sequence[float]


def load_matplotlib() -> ModuleType:
    """matplotlib.figure. Raises TierCacheError where it is not installed."""
    try:
        return import_module("matplotlib.figure")
    except ImportError as error:
        raise TierCacheError(
            f"--plot draws with matplotlib, which cannot be imported ({error}): pip install 'tiercache[plot]'"
        ) from error


def check_plot(path: Path | None) -> None:
    """See that a plot can be drawn, before anything is computed for it.

    Raises:
        ValueError: another kind of file, or a folder that is not there.
        TierCacheError: no matplotlib.
    """
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--plot takes a file that ends in {', '.join(FORMATS)}, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot: there is no folder {path.absolute().parent}")
    load_matplotlib()


def draw(path: Path, lines: Sequence[Line], *, data_bytes: int, title: str) -> None:
    """Write the plot: bytes fetched an epoch and hit ratio over cache size.

    data_bytes: of all that is read, one dotted line. Raises as check_plot(), and OSError.
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
    _label(fetched, f"fetched in an epoch, {name}", name)
    _label(hits, "hit ratio, %", name)
    hits.set_ylim(-2, 102)
    for axes in (fetched, hits):
        axes.axvline(data_bytes / unit, color="0.6", linestyle=":", linewidth=1)
    fetched.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _label(axes: Any, y: str, unit: str) -> None:
    axes.set_xlabel(f"cache of a node, {unit}")
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _unit(n_bytes: int) -> tuple[int, str]:
    """The unit that format_bytes gives a size, in bytes, and its name."""
    name = format_bytes(n_bytes).split()[1]
    return 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(name), name
