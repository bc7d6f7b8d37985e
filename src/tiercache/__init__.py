"""Shards, a local NVMe cache and a drop-in DataLoader for training data in object stores.

``import tiercache`` loads only the exception classes. Every other public name is imported on its first use, so that a
program pays for torch, pyarrow and the native modules only if it uses them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tiercache.distribution import __version__, install_command
from tiercache.errors import (
    ArchivedShards,
    CacheFull,
    CommitConflict,
    CorruptCheckpoint,
    CorruptShard,
    NotFound,
    ObjectChanged,
    SchemaError,
    StoreError,
    TierCacheError,
    UnsupportedFormat,
)

if TYPE_CHECKING:
    from tiercache.cache import Cache
    from tiercache.checkpoint.checkpoints import Checkpoints
    from tiercache.checkpoint.weights import open_weights
    from tiercache.data.dataset import Dataset, concat, mix
    from tiercache.data.output_spec import Buffer, Padded, describe
    from tiercache.data.packing import pack_sequences
    from tiercache.images.options import DecodeImage
    from tiercache.keep import Keep
    from tiercache.load.collate import collate
    from tiercache.load.loader import DataLoader
    from tiercache.load.numpy_loader import NumpyLoader
    from tiercache.load.options import LoaderOptions
    from tiercache.pack import pack
    from tiercache.rng import rng
    from tiercache.shard.schema import Image, Ragged, Tensor
    from tiercache.shard.versions.manifest import Version
    from tiercache.shard.write.dataset_writer import Writer
    from tiercache.store.placement.locations import locate

__all__ = [
    "ArchivedShards",
    "Buffer",
    "Cache",
    "CacheFull",
    "Checkpoints",
    "CommitConflict",
    "CorruptCheckpoint",
    "CorruptShard",
    "DataLoader",
    "Dataset",
    "DecodeImage",
    "Image",
    "Keep",
    "LoaderOptions",
    "NotFound",
    "NumpyLoader",
    "ObjectChanged",
    "Padded",
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
    "describe",
    "locate",
    "mix",
    "open_weights",
    "pack",
    "pack_sequences",
    "rng",
]

_HOMES = {
    "Buffer": "tiercache.data.output_spec",
    "Cache": "tiercache.cache",
    "Checkpoints": "tiercache.checkpoint.checkpoints",
    "DataLoader": "tiercache.load.loader",
    "Dataset": "tiercache.data.dataset",
    "DecodeImage": "tiercache.images.options",
    "Image": "tiercache.shard.schema",
    "Keep": "tiercache.keep",
    "LoaderOptions": "tiercache.load.options",
    "NumpyLoader": "tiercache.load.numpy_loader",
    "Padded": "tiercache.data.output_spec",
    "Ragged": "tiercache.shard.schema",
    "Tensor": "tiercache.shard.schema",
    "Version": "tiercache.shard.versions.manifest",
    "Writer": "tiercache.shard.write.dataset_writer",
    "collate": "tiercache.load.collate",
    "concat": "tiercache.data.dataset",
    "describe": "tiercache.data.output_spec",
    "locate": "tiercache.store.placement.locations",
    "mix": "tiercache.data.dataset",
    "open_weights": "tiercache.checkpoint.weights",
    "pack": "tiercache.pack",
    "pack_sequences": "tiercache.data.packing",
    "rng": "tiercache.rng",
}
# Functions that have the names of the modules that define them.
_OF_MODULES = ("pack", "rng")

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
        message = f"tiercache.{name} needs {library}, which is not installed: {install_command('torch')}"
        raise ModuleNotFoundError(message, name=error.name) from error
    if name not in _OF_MODULES:
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _TopModule(ModuleType):
    """Module class that keeps ``tiercache.pack`` and ``tiercache.rng`` the functions.

    Importing the modules of these names would otherwise bind the attributes to the modules.
    """

    @property
    def pack(self) -> Any:
        return __getattr__("pack")

    @pack.setter
    def pack(self, value: Any) -> None:
        if not isinstance(value, ModuleType):
            raise AttributeError("tiercache.pack cannot be replaced")

    @property
    def rng(self) -> Any:
        return __getattr__("rng")

    @rng.setter
    def rng(self, value: Any) -> None:
        if not isinstance(value, ModuleType):
            raise AttributeError("tiercache.rng cannot be replaced")


sys.modules[__name__].__class__ = _TopModule
