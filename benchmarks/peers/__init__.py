"""The comparison with other libraries: `make bench-peers`."""
