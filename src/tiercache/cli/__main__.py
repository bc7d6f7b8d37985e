"""Run the command as ``python -m tiercache.cli``, where its script is not on the PATH."""

from __future__ import annotations

from tiercache.cli.app import main

if __name__ == "__main__":
    main()
