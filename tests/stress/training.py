"""A process to be killed: it "trains" two epochs through the cache, going on where it was.

`python -m tests.stress.training PROGRESS URL CACHE STATE LOG`. Each step appends a line
"epoch offset ids" to LOG and then replaces STATE by the loader's state, whole or not at all.
"""

import json
import os
import sys
from pathlib import Path

from tests.support.records import check_batch

import tiercache as tc

N_EPOCHS = 2


def make_loader(url: str, cache: tc.Cache) -> tc.DataLoader:
    options = tc.LoaderOptions(seed=6, shuffle_window_bytes="8KiB", shuffle_group_bytes="32KiB")
    return tc.DataLoader(tc.Dataset(url, cache=cache), batch_size=8, shuffle=True, options=options)


def main(progress: str, url: str, cache_folder: str, state_path: str, log_path: str) -> None:
    with Path(progress).open("a") as file, Path(log_path).open("a") as log:
        with tc.Cache(cache_folder, size="64MiB", min_free=0) as cache:
            loader = make_loader(url, cache)
            if Path(state_path).exists():
                loader.load_state_dict(json.loads(Path(state_path).read_text()))
            print("begin", file=file, flush=True)
            while loader.state_dict()["epoch"] < N_EPOCHS:
                train_an_epoch(loader, Path(state_path), log)
            loader.dataset.close()
        print("end", file=file, flush=True)


def train_an_epoch(loader, state_path, log) -> None:
    before = loader.state_dict()
    for batch in loader:
        print(before["epoch"], before["offset"], json.dumps(check_batch(batch)), file=log, flush=True)
        before = loader.state_dict()
        save(state_path, before)
    save(state_path, loader.state_dict())


def save(path, state) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(state))
    os.replace(temporary, path)  # noqa: PTH105 -- the same, and named as what it is: atomic


if __name__ == "__main__":
    main(*sys.argv[1:])
