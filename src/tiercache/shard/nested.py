"""Nested Arrow types: their storable form, their numbers of nodes and buffers, and arrays built over memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pyarrow as pa
import pyarrow.types as pt

from tiercache.errors import SchemaError

MAX_DEPTH = 32


def storable_type(arrow_type: pa.DataType, depth: int = 0) -> pa.DataType:
    """Return the type as which an Arrow type is stored.

    A dictionary is stored as its values, a view as the large type, and an extension type as its storage type.

    Raises:
        SchemaError: The type has no storable form (union, run-end encoding), or is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise SchemaError(f"an Arrow type may be nested at most {MAX_DEPTH} levels deep")
    if isinstance(arrow_type, pa.BaseExtensionType):
        return storable_type(arrow_type.storage_type, depth + 1)
    if pt.is_dictionary(arrow_type):
        return storable_type(arrow_type.value_type, depth + 1)
    if pt.is_string_view(arrow_type):
        return pa.large_string()
    if pt.is_binary_view(arrow_type):
        return pa.large_binary()
    if pt.is_struct(arrow_type):
        return pa.struct([_storable_field(arrow_type.field(i), depth) for i in range(arrow_type.num_fields)])
    if pt.is_map(arrow_type):
        key, item = storable_type(arrow_type.key_type, depth + 1), _storable_field(arrow_type.item_field, depth)
        return pa.map_(key, item, keys_sorted=arrow_type.keys_sorted)
    if pt.is_fixed_size_list(arrow_type):
        return pa.list_(_storable_field(arrow_type.value_field, depth), arrow_type.list_size)
    if pt.is_large_list(arrow_type) or _is_view(arrow_type):
        return pa.large_list(_storable_field(arrow_type.value_field, depth))
    if pt.is_list(arrow_type):
        return pa.list_(_storable_field(arrow_type.value_field, depth))
    count_nodes_and_buffers(arrow_type)
    return arrow_type


def _is_view(arrow_type: pa.DataType) -> bool:
    return bool(pt.is_list_view(arrow_type) or pt.is_large_list_view(arrow_type))


def _storable_field(field: pa.Field, depth: int) -> pa.Field:
    return pa.field(field.name, storable_type(field.type, depth + 1), nullable=field.nullable)


@lru_cache(maxsize=1024)
def count_nodes_and_buffers(arrow_type: pa.DataType) -> tuple[int, int]:
    """Return the numbers of nodes and of buffers of an array of a storable type.

    Raises:
        SchemaError: The type cannot be stored.
    """
    nodes, buffers = 1, _own_buffers(arrow_type)
    for child in _children(arrow_type):
        child_nodes, child_buffers = count_nodes_and_buffers(child)
        nodes, buffers = nodes + child_nodes, buffers + child_buffers
    return nodes, buffers


def _own_buffers(arrow_type: pa.DataType) -> int:
    if pt.is_struct(arrow_type) or pt.is_fixed_size_list(arrow_type) or pt.is_null(arrow_type):
        return 1
    if (
        pt.is_binary(arrow_type)
        or pt.is_string(arrow_type)
        or pt.is_large_binary(arrow_type)
        or pt.is_large_string(arrow_type)
    ):
        return 3
    if pt.is_list(arrow_type) or pt.is_large_list(arrow_type) or pt.is_map(arrow_type):
        return 2
    if pt.is_primitive(arrow_type) or pt.is_fixed_size_binary(arrow_type) or pt.is_decimal(arrow_type):
        return 2
    raise SchemaError(f"values of the Arrow type {arrow_type} cannot be stored; cast them first")


def _children(arrow_type: pa.DataType) -> list[pa.DataType]:
    if pt.is_map(arrow_type):
        return [pa.struct([arrow_type.key_field, arrow_type.item_field])]
    if pt.is_nested(arrow_type):
        return [arrow_type.field(i).type for i in range(arrow_type.num_fields)]
    return []


def build_array(
    arrow_type: pa.DataType, nodes: Iterator[tuple[int, int]], buffers: Iterator[pa.Buffer | None]
) -> pa.Array:
    """Return an array over buffers, without a copy.

    Args:
        arrow_type: Storable type of the array.
        nodes: (length, nulls) of each node, depth first.
        buffers: Buffers, depth first.

    Raises:
        pyarrow.ArrowException: Nodes and buffers do not fit the type. Arrow makes only cheap checks.
    """
    length, nulls = next(nodes)
    own = [next(buffers) for _ in range(_own_buffers(arrow_type))]
    if not nulls:
        own[0] = None
    children = [build_array(child, nodes, buffers) for child in _children(arrow_type)]
    return pa.Array.from_buffers(arrow_type, length, own, nulls, children=children)
