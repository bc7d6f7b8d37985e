"""The records that the loader and `Dataset` read: versions, views of them, and data sets joined, mixed or zipped.

`records` has `Records`, its tree of nodes and the steps of views; `scan` evaluates filters and yields Arrow batches;
`selection` has `Selection`, the runs of record numbers; `split` makes disjoint parts; `zipped` puts the columns of two
versions side by side; `packing` makes rows of tokens of documents; `plans` divides a reading
plan among versions.
"""

from tiercache.views.records import Records, RecordsSpec, join, mix
from tiercache.views.scan import arrow_batches, spans

__all__ = ["Records", "RecordsSpec", "arrow_batches", "join", "mix", "spans"]
