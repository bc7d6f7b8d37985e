"""A data set larger than the memory that may be used: read ahead, in a control group with a limit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.support.cgroup import NoCgroup, drop_pages, memory_group

import tiercache as tc

LIMIT_BYTES = 384 << 20  # of which Python and torch take 210 MiB
RECORD_BYTES, N_BYTES = 16384, 3 * LIMIT_BYTES

CHILD = """
import json, sys
import numpy as np
import tiercache as tc
from tiercache.load import windows
near, plain = [], windows._read
def read(*given):
    near.append(plain(*given))
    return near[-1]
windows._read = read
dataset = tc.Dataset(sys.argv[1])
seen = np.zeros(len(dataset), int)
options = tc.LoaderOptions(seed=1, shuffle_group_bytes="all", shuffle_window_bytes="32MiB")
for batch in tc.DataLoader(dataset, batch_size=256, shuffle=True, options=options):
    seen[batch["id"].numpy()] += 1
    assert (batch["content"][:, 0].numpy() == batch["id"].numpy() % 251).all()
dataset.close()
print(json.dumps({"once": bool((seen == 1).all()), "near_bytes": sum(near)}))
"""


def write(folder: Path) -> None:
    schema = {"id": "int64", "content": tc.Tensor("uint8", (RECORD_BYTES - 8,))}
    with tc.Writer(folder, schema=schema, compression="none") as writer:
        for first in range(0, N_BYTES // RECORD_BYTES, 1024):
            ids = np.arange(first, min(first + 1024, N_BYTES // RECORD_BYTES))
            content = np.repeat((ids % 251).astype(np.uint8)[:, None], RECORD_BYTES - 8, axis=1)
            writer.write_batch({"id": ids, "content": content})


@pytest.mark.stress
def test_a_data_set_three_times_the_memory_limit_is_read_ahead_and_served_once(tmp_path):
    try:
        with memory_group(LIMIT_BYTES) as group:
            write(tmp_path / "data")
            drop_pages(tmp_path / "data")
            command = group.command([sys.executable, "-c", CHILD, str(tmp_path / "data")])
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    except NoCgroup as error:
        pytest.skip(f"no control group with a memory limit: {error}")
    found = json.loads(done.stdout)
    assert found["once"]
    assert found["near_bytes"] > N_BYTES * 0.9
