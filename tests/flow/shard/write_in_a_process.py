"""Run by test_dataset_writer.py: write_in_a_process.py FOLDER appends for ever, one line on standard output a batch."""

from __future__ import annotations

import sys

import numpy as np

from tiercache.shard.writer import Writer

with Writer(sys.argv[1], mode="append", shard_size=4000, block_size=1000) as writer:
    while True:
        print("written", flush=True)
        writer.write_batch({"x": np.arange(100), "text": ["some text"] * 100})
