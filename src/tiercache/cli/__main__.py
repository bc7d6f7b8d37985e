"""``python -m tiercache.cli``: the command, where its script is not on the path."""

from __future__ import annotations

from tiercache.cli.app import main

if __name__ == "__main__":
    main()
