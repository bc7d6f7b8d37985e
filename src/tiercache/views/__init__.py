"""Views, joined data sets and mixtures: sources over other sources, which the loader and `Dataset` read.

`choosing` holds the selection methods of `Dataset`, `steps` and `filtering` evaluate them to a `Selection`, `view`,
`joined` and `mixed` are the sources, and `contract` holds their interface.
"""

from tiercache.views.choosing import SelectionMethods, record_numbers
from tiercache.views.contract import Readable, SourceSpec
from tiercache.views.joined import Joined
from tiercache.views.mixed import Mixed
from tiercache.views.reading import arrow_batches, spans
from tiercache.views.view import View

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
