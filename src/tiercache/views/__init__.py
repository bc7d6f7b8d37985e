"""Views: some records of a data set, and data sets joined or mixed; sources that the loader and `Dataset` read by."""

from tiercache.views.choosing import Choosing, record_numbers
from tiercache.views.contract import Plan, Readable
from tiercache.views.joined import Joined
from tiercache.views.mixed import Mixed
from tiercache.views.reading import arrow_batches, spans
from tiercache.views.view import View

__all__ = ["Choosing", "Joined", "Mixed", "Plan", "Readable", "View", "arrow_batches", "record_numbers", "spans"]
