"""Packing: a folder of images, Parquet files or JSON lines become a data set."""

from __future__ import annotations

from tiercache.pack.options import PackOptions, PackProgress
from tiercache.pack.packing import PackPlan, pack, plan_pack, run_pack

__all__ = ["PackOptions", "PackPlan", "PackProgress", "pack", "plan_pack", "run_pack"]
