"""Shards, a local NVMe cache and a drop-in DataLoader for training data in object stores.

``import tiercache`` loads only the exception classes. Every other public name is imported on its first use, so that a
program pays for torch, pyarrow and the native modules only if it uses them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tiercache.distribution import __version__, install_command
from tiercache.errors import (
    ArchivedShards,
    CorruptCheckpoint,
    CorruptShard,
    NotFound,
    ObjectChanged,
    SchemaError,
    StoreError,
    TierCacheError,
)

if TYPE_CHECKING:
    from tiercache.cache import Cache
    from tiercache.checkpoint.checkpoints import Checkpoints
    from tiercache.checkpoint.weights import open_weights
    from tiercache.data.dataset import Dataset, concat, mix
    from tiercache.data.output_spec import Padded
    from tiercache.data.packing import pack_sequences
    from tiercache.data.versions import Versions
    from tiercache.images.decode_image import DecodeImage
    from tiercache.integrations import ray as ray
    from tiercache.keep import Keep
    from tiercache.load.collate import CutMix, MixUp, collate
    from tiercache.load.loader import DataLoader
    from tiercache.load.loader_options import LoaderOptions
    from tiercache.load.numpy_loader import NumpyLoader
    from tiercache.packer.export import export
    from tiercache.packer.pack import pack
    from tiercache.shard.schema import Image, Ragged, Tensor
    from tiercache.shard.writer import Writer
    from tiercache.store.placement import locate
    from tiercache.transform_rng import rng

__all__ = [
    "ArchivedShards",
    "Cache",
    "Checkpoints",
    "CorruptCheckpoint",
    "CorruptShard",
    "CutMix",
    "DataLoader",
    "Dataset",
    "DecodeImage",
    "Image",
    "Keep",
    "LoaderOptions",
    "MixUp",
    "NotFound",
    "NumpyLoader",
    "ObjectChanged",
    "Padded",
    "Ragged",
    "SchemaError",
    "StoreError",
    "Tensor",
    "TierCacheError",
    "Versions",
    "Writer",
    "__version__",
    "collate",
    "concat",
    "export",
    "locate",
    "mix",
    "open_weights",
    "pack",
    "pack_sequences",
    "rng",
]

_HOMES = {
    "Cache": "tiercache.cache",
    "Checkpoints": "tiercache.checkpoint.checkpoints",
    "CutMix": "tiercache.load.collate",
    "DataLoader": "tiercache.load.loader",
    "MixUp": "tiercache.load.collate",
    "Dataset": "tiercache.data.dataset",
    "DecodeImage": "tiercache.images.decode_image",
    "Image": "tiercache.shard.schema",
    "Keep": "tiercache.keep",
    "LoaderOptions": "tiercache.load.loader_options",
    "NumpyLoader": "tiercache.load.numpy_loader",
    "Padded": "tiercache.data.output_spec",
    "Ragged": "tiercache.shard.schema",
    "Tensor": "tiercache.shard.schema",
    "Versions": "tiercache.data.versions",
    "Writer": "tiercache.shard.writer",
    "collate": "tiercache.load.collate",
    "concat": "tiercache.data.dataset",
    "export": "tiercache.packer.export",
    "locate": "tiercache.store.placement",
    "mix": "tiercache.data.dataset",
    "open_weights": "tiercache.checkpoint.weights",
    "pack": "tiercache.packer.pack",
    "pack_sequences": "tiercache.data.packing",
    "rng": "tiercache.transform_rng",
}

# What must be installed for a library that is missing.
_EXTRAS = {"torch": "torch", "torchdata": "torch", "ray": "ray"}


_RAY = "tiercache.integrations.ray"  # a module: not among the names of a star import, which would need Ray


def __getattr__(name: str) -> Any:
    """Import a public name from its module on its first use (PEP 562)."""
    if name not in _HOMES and name != "ray":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = import_module(_RAY) if name == "ray" else getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _EXTRAS:
            raise
        message = f"tiercache.{name} needs {library}, which is not installed: {install_command(_EXTRAS[library])}"
        raise ModuleNotFoundError(message, name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
