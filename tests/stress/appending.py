"""`python -m tests.stress.appending URL OPTIONS WRITER N START`: when the file START exists, appends N times to URL.

OPTIONS: Storage options as JSON. Each commit adds PART records, which say the writer and the number of the commit.
"""

import json
import sys
from pathlib import Path

import tiercache as tc
from tiercache.waiting import wait_for

PART = 7
SCHEMA = {"writer": "int32", "commit": "int32", "row": "int32"}


def main(url: str, options: str, writer: str, n_commits: str, start: str) -> None:
    storage_options = json.loads(options)
    tc.Versions(url, storage_options=storage_options).list()  # all is imported and connected
    print("ready", flush=True)
    assert wait_for(Path(start).exists, 60)
    for commit in range(int(n_commits)):
        with tc.Writer(url, mode="append", storage_options=storage_options) as appended:
            for row in range(PART):
                appended.write({"writer": int(writer), "commit": commit, "row": row})


if __name__ == "__main__":
    main(*sys.argv[1:])
