"""Data sets made of several: `mix`, by weight, and `zip_columns`, side by side. `concat` is in dataset.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, TypeAlias, get_args

from tiercache.data.dataset import Dataset, alike_datasets, over_records
from tiercache.data.opened_version import OpenedVersion
from tiercache.data.output_spec import OutputSpec
from tiercache.data.records import Records
from tiercache.data.records import mix as mixed_records
from tiercache.data.zipped import ZippedVersion

MixStop: TypeAlias = Literal["first_exhausted", "all_exhausted", "first", "all"]
_MIX_STOPS = get_args(MixStop)


# The weight of each data set, in their order or by their names; or a list of (position, such weights).
MixWeights: TypeAlias = (
    Iterable[float] | Mapping[str, float] | Iterable[tuple[int, Sequence[float] | Mapping[str, float]]]
)


def mix(
    datasets: Iterable[Dataset] | Mapping[str, Dataset], weights: MixWeights, stop: MixStop = "first_exhausted"
) -> Dataset:
    """Return data sets mixed by weight: every range of records holds each data set's share.

    It is made for `tiercache.DataLoader`, which reads it by its native path: each data set is shuffled by itself and
    has its own epochs. A data set that is larger than its share of an epoch continues in the next epoch where it
    stopped; a smaller one starts again. By index, and in other loaders, the mixture is the same unshuffled first epoch
    each time: record i is the record at position i.

    Args:
        datasets: Data sets as for `concat`, each with one record or more. A dict names them for `weights`.
        weights: Positive number for each data set: a list, or a dict by the names of `datasets`. Only their ratio
            counts, and it is exact (a float stands for its decimal digits). For weights that change, a list of
            (position, weights): the first position is 0, the others rise, and the weights hold from that position of an
            epoch on. There a weight may be 0, and a dict may leave out a name for that. Each epoch begins with the
            first weights.
        stop: End of an epoch: "first_exhausted": before any data set would repeat a record; "all_exhausted": when every
            data set has been served completely. "first" and "all" are short forms of these.

    Raises:
        SchemaError, TypeError: See `concat`.
        ValueError: See `concat`; or the weights are invalid, or a data set has no records.
    """
    names = tuple(datasets) if isinstance(datasets, Mapping) else None
    datasets = alike_datasets(datasets.values() if isinstance(datasets, Mapping) else datasets, "mix")
    if stop not in _MIX_STOPS:
        raise ValueError(f"stop must be {', '.join(map(repr, _MIX_STOPS))}, got {stop!r}")
    accesses, first = [dataset.__tiercache__() for dataset in datasets], datasets[0]
    short: Literal["first", "all"] = "first" if stop.startswith("first") else "all"
    mixed = mixed_records([access.source for access in accesses], _weights_in_order(weights, names), short)
    return over_records(mixed, accesses[0].output_spec, first.transform, first.batch_transform)


def _weights_in_order(weights: Any, names: tuple[str, ...] | None) -> tuple[Any, ...]:
    """Return the weights of a mixture, or a schedule of weights, with the weights in the order of the data sets."""
    if isinstance(weights, Mapping):
        missing = [name for name in names or () if name not in weights]
        if missing:
            raise ValueError(f"weights has no weight of the data set {missing[0]!r}")
        return _by_name(weights, names)
    return tuple(
        (entry[0], _by_name(entry[1], names) if isinstance(entry[1], Mapping) else tuple(entry[1]))
        if isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[1], Iterable)
        else entry
        for entry in weights
    )


def _by_name(weights: Mapping[str, float], names: tuple[str, ...] | None) -> tuple[float, ...]:
    if names is None:
        raise ValueError("weights by name need data sets by name: mix({'web': a, 'code': b}, ...)")
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise ValueError(f"weights names {unknown[0]!r}, and the data sets are {list(names)}")
    return tuple(weights.get(name, 0) for name in names)


def zip_columns(left: Dataset, right: Dataset) -> Dataset:
    """Return a data set with the columns of two data sets side by side: record i has the values of record i of each.

    A loader reads it by its native path. Its shards and blocks, and therefore its order, are those of `left`; the rows
    of `right` are copied when a block is loaded, so `right` is the data set with the smaller columns. Both may lie in
    different stores and caches, and be packed in shards of any size. A state names the versions of both.

    Args:
        left: Data set with all records of a version, in any columns and with any output options.
        right: The same with equally many records, in the same order, and with other names of columns. Only the number
            of records is compared.

    Raises:
        TypeError: An argument is not a tiercache data set.
        ValueError: The numbers of records differ; both have a column (or one has an entry) of one name; or one is a
            view, packed, joined, mixed or zipped, has a transform, serves tuples, or is of a subclass that overrides
            record access.
    """
    versions: list[OpenedVersion] = []
    specs: list[OutputSpec] = []
    for number, dataset in enumerate((left, right)):
        if not isinstance(dataset, Dataset):
            raise TypeError(f"zip_columns() takes two tiercache data sets, got a {type(dataset).__name__}")
        access = dataset.__tiercache__()
        version = access.source.leaves[0]
        if access.source.node is not None or not isinstance(version, OpenedVersion):
            raise ValueError(
                f"data set {number} is a view, joined, mixed, zipped or packed: zip whole data sets, and then select "
                "from the result"
            )
        if not access.is_plain or access.batch_transform is not None or access.output_spec.names is not None:
            raise ValueError(
                f"data set {number} has a transform, serves tuples or overrides record access: zip plain data sets"
            )
        versions.append(version)
        specs.append(access.output_spec)
    zipped = Records((ZippedVersion(versions[0], versions[1]),))
    names = [field.name for field in fields(OutputSpec) if field.name != "names"]
    merged: dict[str, Any] = {name: {**getattr(specs[0], name), **getattr(specs[1], name)} for name in names}
    spec = OutputSpec(**merged)
    for column in zipped.schema.columns:
        entry = f"{column.name}.lengths"
        if spec.layout(column) == "padded" and entry in zipped.schema.names:
            raise ValueError(f"{entry!r} is a column of one data set and an entry of a padded column of the other")
    return over_records(zipped, spec)
