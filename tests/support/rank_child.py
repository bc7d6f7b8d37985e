"""One rank of a job: `python -m tests.support.rank_child MODULE:FUNCTION ARGUMENTS RESULT`; see ranks.py."""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path


def main(target: str, arguments: str, result_path: str) -> int:
    module, _, function = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    except Exception:  # noqa: BLE001 -- the process's top: the test shows it
        traceback.print_exc()
        return 1
    Path(result_path).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a rank whose peers were killed may wait for them in a destructor
