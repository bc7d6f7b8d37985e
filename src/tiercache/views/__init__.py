"""Views, joined data sets and mixtures: sources over other sources, which the loader and `Dataset` read.

`view` holds the selection methods of `Dataset`, their steps and the source that they make; `scan` evaluates a filter
to a `Selection`; `joined` has joined and mixed sources; `selection` has `Selection` and the interface of all sources.
"""

from tiercache.views.joined import Joined, Mixed
from tiercache.views.scan import arrow_batches, spans
from tiercache.views.selection import Readable, SourceSpec
from tiercache.views.view import SelectionMethods, View, record_numbers

__all__ = [
    "Joined",
    "Mixed",
    "Readable",
    "SelectionMethods",
    "SourceSpec",
    "View",
    "arrow_batches",
    "record_numbers",
    "spans",
]
