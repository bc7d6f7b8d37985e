"""Fetching into the cache: units of 4 KiB, partial copies, the download, and the publishing of complete copies."""
