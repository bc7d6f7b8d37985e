"""open_weights: which files, mapped memory, ranges, one copy for all processes, and corrupt copies."""

import json
import textwrap
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save as save_numpy
from safetensors.torch import save
from tests.support.checkpoint_files import write_checkpoint
from tests.support.http_server import HttpFaultServer

from tiercache.cache import Cache
from tiercache.checkpoint import weights as weights_module
from tiercache.checkpoint.weights import Weights, open_weights
from tiercache.errors import CorruptCheckpoint, NotFound
from tiercache.store import LocalFolder

TENSORS = {
    "embed": torch.randn(100, 16),
    "layer.weight": torch.randn(64, 64, dtype=torch.bfloat16),
    "layer.bias": torch.arange(7, dtype=torch.int8),
    "scale": torch.tensor(3.5, dtype=torch.float64),
    "none": torch.empty(0, 4),
}


def equal(found, expected=TENSORS):
    return found.keys() == expected.keys() and all(
        found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in expected.items()
    )


def model_folder(folder, tensors=TENSORS, n_files=2):
    """A folder as transformers writes it, with an index."""
    folder.mkdir(exist_ok=True, parents=True)
    index = {}
    for number in range(n_files):
        name = f"model-{number + 1:05d}-of-{n_files:05d}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[number::n_files]}
        (folder / name).write_bytes(save(part, metadata={"format": "pt"}))
        index |= dict.fromkeys(part, name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_folder_with_an_index_a_single_file_and_a_folder_of_files_are_opened(tmp_path):
    indexed = model_folder(tmp_path / "indexed")
    single = tmp_path / "single"
    single.mkdir()
    (single / "model.safetensors").write_bytes(save(TENSORS))
    others = tmp_path / "others"
    others.mkdir()
    (others / "adapter.safetensors").write_bytes(save(TENSORS))
    for url in (
        indexed,
        indexed / "model.safetensors.index.json",
        single,
        single / "model.safetensors",
        others,
        f"file://{others}",
    ):
        with open_weights(url) as weights:
            assert equal(dict(weights)), url


def test_checkpoints_are_opened_by_their_folder_or_as_the_one_written_last(tmp_path):
    store = LocalFolder(tmp_path)
    first = write_checkpoint(store, 1, {"model": {"w": torch.ones(3)}})
    write_checkpoint(store, 2, {"model": dict(TENSORS), "optim": {"m": torch.zeros(2)}})
    with open_weights(tmp_path / first) as weights:
        assert equal(dict(weights), {"model.w": torch.ones(3)})
    with open_weights(tmp_path, prefix="model.") as weights:
        assert equal(dict(weights))


def test_arrays_of_numpy_are_served_without_torch(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(True)}
    (tmp_path / "model.safetensors").write_bytes(save_numpy(arrays))
    with open_weights(tmp_path, framework="numpy") as weights:
        found = dict(weights)
    assert all(np.array_equal(found[key], value) and found[key].dtype == value.dtype for key, value in arrays.items())


def test_what_is_no_folder_of_weights_is_an_error_that_says_what_was_expected(tmp_path):
    with pytest.raises(NotFound, match=r"no model\.safetensors\.index\.json, model\.safetensors, other"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CorruptCheckpoint, match="not a safetensors file"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(save(TENSORS)[:-1])
    with pytest.raises(CorruptCheckpoint, match="the header describes"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint, match="not an index"):
        open_weights(tmp_path)
    with pytest.raises(ValueError, match="framework is 'torch' or 'numpy'"):
        open_weights(tmp_path, framework="jax")
    folder = model_folder(tmp_path / "model")
    with pytest.raises(NotFound, match="there are embed"):
        open_weights(folder, prefix="model.")
    weights = open_weights(folder)
    weights.close()
    with pytest.raises(ValueError, match="these weights are closed"):
        weights["embed"]


def test_a_header_longer_than_the_first_read_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_module, "_HEADER_GUESS_BYTES", 20)
    with open_weights(model_folder(tmp_path)) as weights:
        assert equal(dict(weights))


def test_tensors_whose_place_is_not_aligned_are_copied(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * ((1 - len(header)) % 4)
    data = np.array([1.5, 2.5], np.float32).tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    with open_weights(tmp_path) as weights:
        assert weights["w"].tolist() == [1.5, 2.5]


# -- memory --------------------------------------------------------------------------------------------------------


def mapped_files():
    return Path("/proc/self/maps").read_text()


def test_tensors_are_views_of_the_mapped_file_and_stay_valid_after_close(tmp_path):
    folder = model_folder(tmp_path, {"w": torch.randn(50_000)}, n_files=1)
    weights = open_weights(folder)
    found = weights["w"]
    assert weights["w"].data_ptr() == found.data_ptr()
    assert "model-00001-of-00001.safetensors" in mapped_files()
    expected = found.clone()
    weights.close()
    weights.close()
    assert torch.equal(found, expected)
    del found
    assert "model-00001-of-00001.safetensors" not in mapped_files()


def test_a_tensor_that_is_written_to_changes_for_its_process_alone(tmp_path):
    folder = model_folder(tmp_path, {"w": torch.zeros(5000)}, n_files=1)
    with open_weights(folder) as first, open_weights(folder) as second:
        first["w"].add_(1)
        assert first["w"].sum() == 5000
        assert second["w"].sum() == 0


# -- through the cache ---------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    with Cache(tmp_path / "cache", size="64MiB") as cache:
        yield cache


BIG = {f"t{n}": torch.randn(1 << 17) for n in range(8)}  # 512 KiB each


def test_only_the_ranges_of_the_tensors_that_are_used_are_fetched_and_once_for_all_readers(tmp_path, cache):
    folder, file = model_folder(tmp_path / "model", BIG, n_files=1), "model-00001-of-00001.safetensors"
    inner = LocalFolder(folder)
    with Weights(cache.store(inner), [file]) as weights:
        assert torch.equal(weights["t3"], BIG["t3"])
        assert inner.counters["bytes_read"] < 1 << 20
        assert equal(weights.load(), BIG)
    assert inner.counters["bytes_read"] < 5 << 20
    again = LocalFolder(folder)
    with Weights(cache.store(again), [file]) as weights:
        assert equal(weights.load(), BIG)
    assert again.counters["bytes_read"] == 0


def test_tensors_stay_valid_when_their_copy_is_evicted(tmp_path, cache):
    inner = LocalFolder(model_folder(tmp_path / "model", BIG, n_files=1))
    with Weights(cache.store(inner), ["model-00001-of-00001.safetensors"]) as weights:
        found = weights.load()
    cache.evict()
    assert equal(found, BIG)


def corrupt(cache, value):
    """Change a byte of a tensor in every copy of the cache; return the number of changed files."""
    needle = value.numpy().tobytes()[:64]
    changed = 0
    for path in Path(cache.path, "copies").iterdir():
        data = path.read_bytes()
        at = data.find(needle)
        if at >= 0:
            with path.open("r+b") as file:
                file.seek(at)
                file.write(bytes([data[at] ^ 1]))
            changed += 1
    return changed


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_corrupt_copy_is_found_at_the_first_use_and_fetched_again(tmp_path, cache, is_whole):
    inner = LocalFolder(model_folder(tmp_path / "model", BIG, n_files=1))
    file = "model-00001-of-00001.safetensors"
    with Weights(cache.store(inner), [file]) as weights:
        weights.load(None if is_whole else ["t1", "t2", "t3"])
    assert corrupt(cache, BIG["t2"]) == 1
    with Weights(cache.store(LocalFolder(inner.url)), [file]) as weights:
        assert torch.equal(weights["t2"], BIG["t2"])
        assert equal(weights.load(), BIG)


def test_tensors_are_fetched_again_after_another_tensor_of_their_copy_was_corrupt(tmp_path, cache):
    inner = LocalFolder(model_folder(tmp_path / "model", BIG, n_files=1))
    with Weights(cache.store(inner), ["model-00001-of-00001.safetensors"]) as weights:
        before = weights["t5"]
        weights.prefetch(["t2"])
        with Weights(cache.store(LocalFolder(inner.url)), ["model-00001-of-00001.safetensors"]) as other:
            assert torch.equal(other["t2"], BIG["t2"])
        assert corrupt(cache, BIG["t2"]) == 1
        assert torch.equal(weights["t2"], BIG["t2"])
        assert torch.equal(weights["t5"], BIG["t5"])
        assert torch.equal(before, BIG["t5"])


def test_files_are_opened_only_for_the_tensors_of_a_checkpoint_that_are_used(tmp_path):
    write_checkpoint(LocalFolder(tmp_path), 1, {f"t{n}": torch.full((5,), n) for n in range(40)}, n_files=40)
    with open_weights(tmp_path) as weights:
        assert weights["t7"].tolist() == [7] * 5
        assert mapped_files().count(".safetensors") == 1


def test_without_a_cache_or_without_room_tensors_are_read_into_memory(tmp_path):
    folder = model_folder(tmp_path / "model", BIG, n_files=2)

    with open_weights(folder, cache=False) as weights:
        assert equal(weights.load(), BIG)
    warns = pytest.warns(RuntimeWarning, match="larger than the whole")
    with Cache(tmp_path / "small", size="1MiB") as small, warns, open_weights(folder, cache=small) as weights:
        assert equal(weights.load(), BIG)
    with HttpFaultServer(folder) as server, open_weights(server.url, cache=False) as weights:
        assert equal(weights.load(), BIG)


def test_two_processes_share_one_download_and_one_copy(tmp_path, warm_python):
    folder = model_folder(tmp_path / "model", BIG, n_files=2)
    program = textwrap.dedent(
        """
        import sys
        from tiercache.cache import Cache
        from tiercache.checkpoint.weights import open_weights

        cache = Cache(sys.argv[2], size="64MiB")
        with cache, open_weights(sys.argv[1], cache=cache) as found:
            total = sum(float(value.double().sum()) for value in found.load().values())
            files = sorted({line.split()[4] for line in open("/proc/self/maps") if "/copies/" in line})
            print(round(total, 3), *files, flush=True)
        """
    )
    total = round(sum(float(value.double().sum()) for value in BIG.values()), 3)
    with HttpFaultServer(folder) as server, ExitStack() as files:
        outs = [files.enter_context((tmp_path / f"out{number}").open("w+")) for number in range(2)]
        errors = [files.enter_context((tmp_path / f"errors{number}").open("w+")) for number in range(2)]
        command = ["-c", program, server.url, str(tmp_path / "cache")]
        processes = [warm_python.start(command, out=out, errors=error) for out, error in zip(outs, errors, strict=True)]
        for number, process in enumerate(processes):
            assert process.wait() == 0, (tmp_path / f"errors{number}").read_text()
        assert server.n_bytes_sent < 1.5 * (4 << 20)
    said = [(tmp_path / f"out{number}").read_text().split() for number in range(2)]
    assert [float(one[0]) for one in said] == [total, total]
    assert said[0][1:] == said[1][1:], "both map the same files"
    assert len(said[0]) == 3
