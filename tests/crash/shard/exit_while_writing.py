"""Writes to the folder in argv[1] and ends without closing the writer, while parts are still on their way."""

import sys

import numpy as np

import tiercache

writer = tiercache.Writer(sys.argv[1], schema={"x": tiercache.Tensor("uint8", (1 << 20,))})
for _ in range(40):
    writer.write_batch({"x": np.random.default_rng(0).integers(0, 256, (1, 1 << 20), np.uint8)})
