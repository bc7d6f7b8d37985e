"""The records that the loader and `Dataset` read: versions, views of them, and several data sets joined or mixed.

`records` has `Records`, its tree of nodes and the steps of views; `scan` evaluates filters and yields Arrow batches;
`selection` has `Selection`, the runs of record numbers.
"""

from tiercache.views.records import Records, RecordsSpec, join, mix
from tiercache.views.scan import arrow_batches, spans

__all__ = ["Records", "RecordsSpec", "arrow_batches", "join", "mix", "spans"]
