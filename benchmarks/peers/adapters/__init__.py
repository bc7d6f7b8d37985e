"""One module per contender, with `pack(source, folder)` and the context manager `opened(job)`, which yields an Opened.

Each module is imported in a process and an environment of its own, and by nothing else.
"""
