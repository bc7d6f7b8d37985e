"""Packing of a source (a folder of images, Parquet files, JSON lines) into a data set.

`plan` lists the source's `files`, recognises its kind and divides it into splits; `images`, `parquet` and `jsonl` read
the records of a split; `executor` writes them with a `Writer`, in this process or in several, and commits once.
`export` writes a data set back to Parquet.
"""

from __future__ import annotations

from tiercache.packer.executor import PackProgress, pack, run_pack
from tiercache.packer.plan import PackOptions, PackPlan, plan_pack

__all__ = [
    "PackOptions",
    "PackPlan",
    "PackProgress",
    "pack",
    "plan_pack",
    "run_pack",
]
