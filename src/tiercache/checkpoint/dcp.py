"""torch.distributed.checkpoint over `tc.Checkpoints`: a StorageWriter and a StorageReader for states of many ranks.

Each rank writes its parts of the tensors as safetensors files, verifies them at the store, and tells the coordinator
their sizes and checksums. The coordinator then writes `dcp.json`, which describes the parts and holds the values that
are not tensors, and puts the manifest. So a checkpoint of a save in which a rank failed has no manifest, and nobody
sees it. torch's planners decide which rank writes and reads which part; nothing is stored as pickle.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

if TYPE_CHECKING:
    import os

    from tiercache.checkpoint.checkpoints import Checkpoints
