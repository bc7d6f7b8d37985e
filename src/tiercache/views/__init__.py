"""The records that the loader and `Dataset` read: versions, views of them, and several data sets joined or mixed.

`records` has `Records`, its tree of nodes and the steps of views; `selection_methods` the methods of `Dataset` that add
steps; `scan` evaluates filters and yields Arrow batches; `selection` has `Selection`, the runs of record numbers.
"""

from tiercache.views.records import Records, RecordsSpec, join, mix
from tiercache.views.scan import arrow_batches, spans
from tiercache.views.selection_methods import SelectionMethods, record_numbers

__all__ = ["Records", "RecordsSpec", "SelectionMethods", "arrow_batches", "join", "mix", "record_numbers", "spans"]
