"""Peers: the machines of a job serve the contents of their caches to each other.

`readers.py` is the side of a reader: a cache that has peers asks `Peers` for the store from which it fetches a copy;
that is the only place of the library that knows peers. `server.py` is what `tiercache serve` runs.
"""
