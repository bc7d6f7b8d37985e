"""NumPy batches in JAX and tf.data, in an environment without torch: the guide's page, content, ranks and resume."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from tests.support import ROOT

import tiercache as tc

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PAGE = ROOT / "docs" / "guide" / "numpy.md"
N = 120


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("arrays") / "data"
    schema = {"x": tc.Tensor("float32", (4,)), "half": "bfloat16", "id": "int64", "text": "str"}
    ids = np.arange(N)
    with tc.Writer(path, schema=schema, shard_size="2KiB", block_size="256B") as writer:
        x = np.tile(ids[:, None], 4).astype(np.float32)
        writer.write_batch({"x": x, "half": ids.astype(np.float32), "id": ids, "text": [f"{i}" for i in ids]})
    return path


@pytest.fixture
def dataset(path):
    dataset = tc.Dataset(path, columns=["x", "id", "text"])
    yield dataset
    dataset.close()  # tf.data keeps its generators, and with them a loader, until the process ends


def test_the_environment_has_no_torch():
    assert importlib.util.find_spec("torch") is None


def test_every_example_of_the_page_runs(tmp_path):
    script = tmp_path / "examples.py"
    blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    missing = [name for name in ("jax", "tensorflow") if importlib.util.find_spec(name) is None]
    script.write_text("\n".join(code for code in blocks if not any(f"import {name}" in code for name in missing)))
    environment = os.environ | {"HOME": str(tmp_path), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class TestJax:
    @pytest.fixture
    def jax(self):
        return pytest.importorskip("jax")

    def test_arrays_on_the_device_keep_their_values_while_later_batches_are_read(self, path, jax):
        loader = tc.NumpyLoader(tc.Dataset(path), 16, shuffle=True, options=tc.LoaderOptions(seed=1))
        kept = [jax.device_put({"x": b["x"], "id": b["id"], "half": b["half"]}) for b in loader]
        ids = np.concatenate([np.asarray(batch["id"]) for batch in kept])
        assert sorted(ids.tolist()) == list(range(N))
        for batch in kept:
            assert batch["half"].dtype == jax.numpy.bfloat16
            assert np.array_equal(np.asarray(batch["x"])[:, 0], np.asarray(batch["id"]))
            assert np.array_equal(np.asarray(batch["half"], np.float32), np.asarray(batch["id"]))


class TestTfData:
    @pytest.fixture
    def tf(self):
        return pytest.importorskip("tensorflow")

    def test_batches_pass_through_a_generator(self, dataset, tf):
        loader = tc.NumpyLoader(dataset, 16, shuffle=True, drop_last=True)
        signature = {
            "x": tf.TensorSpec((16, 4), tf.float32),
            "id": tf.TensorSpec((16,), tf.int64),
            "text": tf.TensorSpec((16,), tf.string),
        }
        batches = tf.data.Dataset.from_generator(lambda: iter(loader), output_signature=signature).prefetch(2)
        epochs = []
        for _ in range(2):
            epochs.append([])
            for batch in batches:
                ids = batch["id"].numpy()
                assert batch["text"].numpy().tolist() == [str(i).encode() for i in ids]
                assert np.array_equal(batch["x"].numpy()[:, 0], ids)
                epochs[-1] += ids.tolist()
        assert all(len(set(ids)) == N // 16 * 16 for ids in epochs)
        assert epochs[0] != epochs[1]
