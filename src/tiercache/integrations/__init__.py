"""Adapters for frameworks that rebuild the user's data loader, and the `tiercache::` file system of fsspec.

Each module needs the framework of its name.
"""
