"""Views, joined data sets and mixtures: sources over other sources, which the loader and `Dataset` read.

`choosing` holds the selection methods of `Dataset`, `steps` and `filtering` evaluate them to a `Selection`, `view`,
`joined` and `mixed` are the sources, and `contract` holds their interface.
"""

from tiercache.views.contract import Readable, SourceSpec
from tiercache.views.joined import Joined, Mixed
from tiercache.views.scan import arrow_batches, spans
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
