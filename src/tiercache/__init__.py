"""Shards, a local NVMe cache and a drop-in DataLoader for training data in object stores.

``import tiercache`` loads only the exception classes. Every other public name is imported on its first use, so that a
program pays for torch, pyarrow and the native modules only if it uses them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tiercache.errors import (
    ArchivedShards,
    CacheFull,
    CommitConflict,
    CorruptShard,
    NotFound,
    ObjectChanged,
    SchemaError,
    StoreError,
    TierCacheError,
    UnsupportedFormat,
)
from tiercache.version import __version__

if TYPE_CHECKING:
    from tiercache.cache import Cache
    from tiercache.dataset import Dataset, concat, mix
    from tiercache.images.options import DecodeImage
    from tiercache.load.batch import collate
    from tiercache.load.loader import DataLoader
    from tiercache.load.options import LoaderOptions
    from tiercache.load.output_spec import Buffer
    from tiercache.pack import pack
    from tiercache.shard.schema import Image, Ragged, Tensor
    from tiercache.shard.versions.manifest import Version
    from tiercache.shard.write.dataset_writer import Writer

__all__ = [
    "ArchivedShards",
    "Buffer",
    "Cache",
    "CacheFull",
    "CommitConflict",
    "CorruptShard",
    "DataLoader",
    "Dataset",
    "DecodeImage",
    "Image",
    "LoaderOptions",
    "NotFound",
    "ObjectChanged",
    "Ragged",
    "SchemaError",
    "StoreError",
    "Tensor",
    "TierCacheError",
    "UnsupportedFormat",
    "Version",
    "Writer",
    "__version__",
    "collate",
    "concat",
    "mix",
    "pack",
]

_HOMES = {
    "Buffer": "tiercache.load.output_spec",
    "Cache": "tiercache.cache",
    "DataLoader": "tiercache.load.loader",
    "Dataset": "tiercache.dataset",
    "DecodeImage": "tiercache.images.options",
    "Image": "tiercache.shard.schema",
    "LoaderOptions": "tiercache.load.options",
    "Ragged": "tiercache.shard.schema",
    "Tensor": "tiercache.shard.schema",
    "Version": "tiercache.shard.versions.manifest",
    "Writer": "tiercache.shard.write.dataset_writer",
    "collate": "tiercache.load.batch",
    "concat": "tiercache.dataset",
    "mix": "tiercache.dataset",
    "pack": "tiercache.pack",
}

_TORCH = ("torch", "torchdata")


def __getattr__(name: str) -> Any:
    """Import a public name from its module on its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _TORCH:
            raise
        message = f"tiercache.{name} needs {library}, which is not installed: pip install 'tiercache[torch]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    if name != "pack":
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _TopModule(ModuleType):
    """Module class that keeps ``tiercache.pack`` the function.

    Importing the package ``tiercache.pack`` would otherwise bind the attribute to the package.
    """

    @property
    def pack(self) -> Any:
        return __getattr__("pack")

    @pack.setter
    def pack(self, value: Any) -> None:
        if not isinstance(value, ModuleType):
            raise AttributeError("tiercache.pack cannot be replaced")


sys.modules[__name__].__class__ = _TopModule
