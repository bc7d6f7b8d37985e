"""tc.NumpyLoader: the batches, the order, the ranks and the states of the DataLoader, without torch."""

from __future__ import annotations

import itertools
import json
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from tests.support.decoded import RANDOM, write
from tests.support.decoded import make_columns as make_pictures
from tests.support.every_kind import EVERY_KIND, columns_of_every_kind, is_same
from tests.support.records import check_batch
from tests.support.transformed import fail_at_seven

import tiercache as tc
from tiercache.data.output_spec import Buffer

N = 100
SEED = 9


def as_plain(value):
    """A value of a batch as what compares by ==, with its kind."""
    if isinstance(value, Buffer):
        return "buffer", as_plain(value.values), as_plain(value.offsets), as_plain(value.shapes)
    if isinstance(value, torch.Tensor):
        return str(value.dtype).removeprefix("torch."), value.tolist()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist()
    if isinstance(value, list):
        return [as_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: as_plain(item) for name, item in value.items()}
    return value


def numbers_of(loader):
    return [batch["id"].tolist() for batch in loader]


SERVED = {
    "as stored": {},
    "padded": {"layouts": {"boxes": "padded", "blob": "padded", "text": "padded"}},
    "buffers": {"layouts": {"boxes": "buffer", "blob": "buffer", "text": "buffer"}},
    "without nulls": {"fill_nulls": {"score": -1.0}},
    "cast": {"cast": {"tokens": "int64", "score": "float64"}},
}


@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED)
def test_batches_equal_those_of_the_data_loader(make_dataset, options):
    dataset = tc.Dataset(make_dataset(N), **options)
    asked = tc.LoaderOptions(seed=SEED)
    for drop_last in (False, True):
        expected = tc.DataLoader(dataset, 16, shuffle=True, drop_last=drop_last, options=asked)
        loader = tc.NumpyLoader(dataset, 16, shuffle=True, drop_last=drop_last, options=asked)
        for _ in range(2):  # epochs
            assert [as_plain(batch) for batch in loader] == [as_plain(batch) for batch in expected]
        assert len(loader) == len(expected)
    assert loader.stats()["samples"] == 2 * (N // 16 * 16)


def test_columns_of_other_types_equal_those_of_the_data_loader(tmp_path):
    with tc.Writer(tmp_path / "data", schema=EVERY_KIND) as writer:
        writer.write_batch(columns_of_every_kind(20))
    columns = [name for name, kind in EVERY_KIND.items() if "bfloat16" not in str(kind)]
    for layouts in ({}, {"boxes": "buffer", "matrix": "buffer"}, {"cut": "padded", "matrix": "padded"}):
        dataset = tc.Dataset(tmp_path / "data", columns=columns, layouts=layouts)
        assert [as_plain(b) for b in tc.NumpyLoader(dataset, 8)] == [as_plain(b) for b in tc.DataLoader(dataset, 8)]


def test_every_kind_of_array_is_numpys_and_may_be_written_to(make_dataset):
    layouts = {"boxes": "padded", "blob": "buffer"}
    for batch in tc.NumpyLoader(tc.Dataset(make_dataset(N), layouts=layouts), 16):
        arrays = [v for v in batch.values() if not isinstance(v, list | Buffer)]
        arrays += [batch["blob"].values, batch["blob"].offsets]
        assert all(type(array) is np.ndarray and array.flags.writeable for array in arrays)
        assert type(batch) is dict
    for batch in tc.NumpyLoader(tc.Dataset(make_dataset(N, "lists")), 16):
        assert check_batch(batch)
        assert all(type(box) is np.ndarray and box.flags.writeable for box in batch["boxes"])


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_state_of_either_loader_resumes_in_the_other_at_every_step(make_dataset, shuffle):
    dataset = tc.Dataset(make_dataset(40))

    def numpys():
        return tc.NumpyLoader(dataset, 8, shuffle=shuffle, options=tc.LoaderOptions(seed=SEED))

    def torchs():
        return tc.DataLoader(dataset, 8, shuffle=shuffle, options=tc.LoaderOptions(seed=SEED))

    whole = [numbers_of(loader) for loader in [torchs()] for _ in range(2)]
    for saver, resumer in ((numpys, torchs), (torchs, numpys), (numpys, numpys)):
        for step in range(len(whole[0]) + 1):
            loader = saver()
            iterator = iter(loader)
            list(itertools.islice(iterator, step))
            if step == len(whole[0]):
                assert next(iterator, None) is None
            state = json.loads(json.dumps(loader.state_dict()))
            resumed = resumer()
            resumed.load_state_dict(state)
            if step < len(whole[0]):
                assert numbers_of(resumed) == whole[0][step:]
            assert numbers_of(resumed) == whole[1]


def test_without_a_seed_a_run_draws_one_from_numpys_generator(make_dataset):
    dataset = tc.Dataset(make_dataset(N))
    runs = []
    for _ in range(2):
        np.random.seed(3)
        loader = tc.NumpyLoader(dataset, 8, shuffle=True)
        runs.append([numbers_of(loader), numbers_of(loader)])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]
    assert numbers_of(tc.NumpyLoader(dataset, 8, shuffle=True)) != runs[0][0]


def test_set_epoch_and_pickling_keep_the_position(make_dataset):
    dataset = tc.Dataset(make_dataset(40))
    options = tc.LoaderOptions(seed=SEED)
    loader = tc.NumpyLoader(dataset, 8, shuffle=True, options=options)
    epochs = [numbers_of(loader) for _ in range(3)]
    loader.set_epoch(1)
    iterator = iter(loader)
    next(iterator)
    copy = pickle.loads(pickle.dumps(loader))
    assert numbers_of(iterator) == numbers_of(copy) == epochs[1][1:]
    assert numbers_of(copy) == epochs[2]
    assert numbers_of(pickle.loads(pickle.dumps(tc.NumpyLoader(dataset, 8)))) == numbers_of(tc.NumpyLoader(dataset, 8))


@pytest.mark.parametrize("decode", [RANDOM, tc.DecodeImage(None), tc.DecodeImage(8, dtype="float32", layout="HWC")])
@pytest.mark.filterwarnings("ignore:.*corrupt.*")
def test_images_equal_those_of_the_data_loader_and_corrupt_ones_are_replaced(tmp_path, decode):
    columns = make_pictures(40)
    columns["image"][5] = b"\xff\xd8\xff no image"
    dataset = tc.Dataset(write(tmp_path / "data", columns), decode={"image": decode})
    options = tc.LoaderOptions(seed=SEED, on_corrupt="previous")
    loader = tc.NumpyLoader(dataset, 8, shuffle=True, options=options)
    for one, other in zip(loader, tc.DataLoader(dataset, 8, shuffle=True, options=options), strict=True):
        assert one["id"].tolist() == other["id"].tolist()
        assert all(type(image) is np.ndarray for image in one["image"])
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(one["image"], other["image"], strict=True))
        assert one["name"] == other["name"]
    assert loader.stats()["skipped"] == 1


class TestBfloat16:
    @pytest.fixture
    def dataset(self, tmp_path):
        with tc.Writer(tmp_path / "half", schema={"x": "bfloat16"}) as writer:
            writer.write_batch({"x": np.array([0.5, 1.0, -2.0], np.float32)})
        dataset = tc.Dataset(tmp_path / "half")
        yield dataset
        dataset.close()

    def test_it_needs_ml_dtypes(self, dataset, monkeypatch):
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        with pytest.raises(tc.SchemaError, match=r"column 'x'.*install ml_dtypes"):
            tc.NumpyLoader(dataset, 2)

    def test_it_is_served_in_the_dtype_of_ml_dtypes(self, dataset, monkeypatch):
        stand_in = types.SimpleNamespace(bfloat16=np.uint16)  # the development environment has no ml_dtypes
        monkeypatch.setitem(sys.modules, "ml_dtypes", stand_in)
        (batch,) = tc.NumpyLoader(dataset, 3)
        assert batch["x"].tolist() == [0x3F00, 0x3F80, 0xC000]


def augment(record):
    """Results of each kind, with draws of the record's own."""
    own = tc.rng()
    return {
        "id": record["id"],
        "text": record["text"],
        "noisy": record["tokens"] + own.numpy.normal(size=6).astype("float32"),
        "drawn": {"seed": np.int64(own.seed >> 1), "number": own.numpy.random(), "is_odd": bool(record["id"] % 2)},
        "pair": (int(record["id"]), [record["flag"], 0.5]),
    }


def add_draws(batch):
    return {**batch, "of_batch": tc.rng().numpy.integers(1 << 40, size=3).tolist()}


def double(batch):
    return {**batch, "tokens": batch["tokens"] * 2, "of_options": [tc.rng().numpy.random()]}


def transformed(path, kind, transform=augment, **more):
    served = {"layouts": {"text": "padded", "boxes": "buffer"}} if transform is None else {}
    dataset = tc.Dataset(path, transform=transform, batch_transform=add_draws, **served)
    batch_transform = double if transform is None else None
    return kind(dataset, 8, shuffle=True, options=tc.LoaderOptions(seed=SEED, batch_transform=batch_transform, **more))


@pytest.mark.parametrize("transform", [augment, None])
def test_transforms_serve_and_draw_what_they_do_in_the_data_loader_also_after_a_resume(make_dataset, transform):
    path = make_dataset(40)
    expected = [
        [as_plain(b) for b in loader] for loader in [transformed(path, tc.DataLoader, transform)] for _ in range(2)
    ]
    loader = transformed(path, tc.NumpyLoader, transform)
    assert [[as_plain(batch) for batch in loader] for _ in range(2)] == expected
    for saver, resumer in itertools.product((tc.NumpyLoader, tc.DataLoader), repeat=2):
        loader = transformed(path, saver, transform)
        iterator = iter(loader)
        for step in range(1, 4):
            next(iterator)
            resumed = transformed(path, resumer, transform)
            resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
            assert [as_plain(batch) for batch in resumed] == expected[0][step:]
    loader = transformed(path, tc.NumpyLoader, transform)
    next(iter(loader))
    copy = pickle.loads(pickle.dumps(loader))
    assert [as_plain(batch) for batch in copy] == expected[0][1:]
    assert loader.stats()["stages"]["transform_s"] > 0


@pytest.mark.parametrize("decode", [None, 12])
def test_a_transform_sees_the_records_that_indexing_gives_and_may_keep_them(tmp_path, decode):
    if decode is None:
        with tc.Writer(tmp_path / "data", schema=EVERY_KIND, block_size="1KiB") as writer:
            writer.write_batch(columns_of_every_kind(30))
        asked = {"columns": [name for name, kind in EVERY_KIND.items() if "bfloat16" not in str(kind)]}
    else:
        write(tmp_path / "data", make_pictures(30))
        asked = {"decode": {"image": tc.DecodeImage(decode)}}
    plain, seen = tc.Dataset(tmp_path / "data", **asked), []
    dataset = tc.Dataset(tmp_path / "data", transform=lambda record: seen.append(record) or 0, **asked)
    batches = list(tc.NumpyLoader(dataset, 7, shuffle=True))
    assert [batch.tolist() for batch in batches] == [[0] * 7] * 4 + [[0] * 2]
    assert len(seen) == 30
    assert all(is_same(record, plain[int(record["id"])]) for record in seen)


def test_results_of_one_shape_become_an_array_and_others_a_list(make_dataset):
    def transform(record):
        return {
            "boxes": record["boxes"],  # of 0 to 3 rows
            "score": record["score"],  # null in each fifth record
            "same": record["boxes"][:0],
            "name": np.str_(record["text"]),
        }

    batch = next(iter(tc.NumpyLoader(tc.Dataset(make_dataset(10), transform=transform), 4)))
    assert [box.shape for box in batch["boxes"]] == [(0, 2), (1, 2), (2, 2), (3, 2)]
    assert batch["score"] == [None, 0.5, 1.0, 1.5]
    assert batch["same"].shape == (4, 0, 2)
    assert batch["name"] == ["text 0", "text 1", "text 2", "text 3"]


@pytest.mark.parametrize(
    ("of_two", "error", "said"),
    [
        (None, TypeError, "returned None"),
        ({"a": 1}, ValueError, "got keys 'a' and keys 'a', 'b'"),
        ({"a": 1, "b": [1]}, ValueError, "got list of 1 and list of 2"),
        ({"a": 1, "b": None}, ValueError, "got NoneType and list of 2"),
    ],
)
def test_results_that_make_no_batch_are_an_error_that_says_how_they_differ(make_dataset, of_two, error, said):
    def transform(record):
        return of_two if record["id"] == 2 else {"a": 1, "b": [1, 2]}

    with pytest.raises(error, match=said) as raised:
        list(tc.NumpyLoader(tc.Dataset(make_dataset(4), transform=transform), 4))
    assert "the batch that begins with record 0" in raised.value.__notes__[0]


def test_an_error_of_a_transform_names_its_record_and_its_batch_does_not_count(make_dataset):
    path = make_dataset(20)
    loader = tc.NumpyLoader(tc.Dataset(path, transform=fail_at_seven), 4)
    iterator = iter(loader)
    assert next(iterator)["id"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ArithmeticError) as raised:
        next(iterator)
    assert raised.value.__notes__ == [f"tiercache: in the transform of record 7 of {str(path)!r}, version 1"]
    assert loader.state_dict()["offset"] == 4


def test_mixup_says_that_it_needs_tensors(tmp_path):
    dataset = tc.Dataset(write(tmp_path / "data", make_pictures(4)), decode={"image": tc.DecodeImage(8)})
    loader = tc.NumpyLoader(dataset, 4, options=tc.LoaderOptions(batch_transform=tc.MixUp(1.0, n_classes=9)))
    with pytest.raises(TypeError, match=r"got a NumPy array: use tiercache\.DataLoader"):
        next(iter(loader))


class Reversed(tc.Dataset):
    def __getitem__(self, index):
        return super().__getitem__(len(self) - 1 - index)


def test_what_cannot_be_served_is_an_error(make_dataset):
    path = make_dataset(10)
    plain = tc.Dataset(path)
    for make, error, said in (
        (lambda: tc.NumpyLoader(Reversed(path), 2), ValueError, "class overrides how records are read.*transform="),
        (lambda: tc.NumpyLoader(tc.Dataset(path, layouts={"boxes": "nested"}), 2), tc.SchemaError, "'boxes'.*nested"),
        (
            lambda: tc.NumpyLoader(tc.Dataset(path), 2, options=tc.LoaderOptions(device="cuda")),
            ValueError,
            "host memory",
        ),
        (lambda: tc.NumpyLoader(plain, 0), ValueError, "1 or more"),
        (lambda: tc.NumpyLoader(plain, 1.5), TypeError, "integer"),
        (lambda: tc.NumpyLoader(plain, 2, options={"seed": 1}), TypeError, "LoaderOptions"),
        (lambda: tc.NumpyLoader(plain, 2).load_state_dict({}), ValueError, "not a state"),
    ):
        with pytest.raises(error, match=said):
            make()


WITHOUT_TORCH = """
import json, sys
for name in ("torch", "torchdata"):
    sys.modules[name] = None  # importing it raises
import tiercache as tc
dataset = tc.Dataset(sys.argv[1])
loader = tc.NumpyLoader(dataset, 8, shuffle=True, options=tc.LoaderOptions(seed=9))
iterator = iter(loader)
served = [next(iterator)["id"].tolist() for _ in range(2)]
state = loader.state_dict()
again = tc.NumpyLoader(dataset, 8, shuffle=True)
again.load_state_dict(state)
rest = [batch["id"].tolist() for batch in again]
pictures = tc.Dataset(sys.argv[2], decode={"image": tc.DecodeImage(8, crop="random", flip=True)})
images = [int(batch["image"].sum()) for batch in tc.NumpyLoader(pictures, 8, options=tc.LoaderOptions(seed=9))]
def add_noise(record):
    return {"id": record["id"], "noisy": record["tokens"] + tc.rng().numpy.random(6)}
def draw(batch):
    return {**batch, "drawn": tc.rng().seed}
noisy = tc.NumpyLoader(
    tc.Dataset(sys.argv[1], transform=add_noise), 8, options=tc.LoaderOptions(seed=9, batch_transform=draw)
)
drawn = [[batch["noisy"].tolist(), batch["drawn"]] for batch in noisy]
assert sys.modules["torch"] is None
print(json.dumps([served, rest, images, state, repr(loader), drawn]))
"""


@pytest.mark.parametrize("rank", [None, 1])
def test_it_works_where_torch_cannot_be_imported(make_dataset, tmp_path, monkeypatch, rank):
    path, pictures = make_dataset(N), write(tmp_path / "pictures", make_pictures(20))
    if rank is not None:  # as a launcher sets them
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, str(path), str(pictures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    served, rest, images, state, shown, drawn = json.loads(done.stdout)
    options = tc.LoaderOptions(seed=SEED)
    loader = tc.DataLoader(tc.Dataset(path), 8, shuffle=True, options=options)
    assert [*served, *rest] == numbers_of(loader)
    loader.load_state_dict(state)
    assert numbers_of(loader) == rest
    decoded = tc.Dataset(pictures, decode={"image": tc.DecodeImage(8, crop="random", flip=True)})
    assert images == [int(batch["image"].sum()) for batch in tc.DataLoader(decoded, 8, options=options)]

    def add_noise(record):
        return {"id": record["id"], "noisy": record["tokens"] + tc.rng().numpy.random(6)}

    options = tc.LoaderOptions(seed=SEED, batch_transform=lambda batch: {**batch, "drawn": tc.rng().seed})
    noisy = tc.DataLoader(tc.Dataset(path, transform=add_noise), 8, options=options)
    assert drawn == [[batch["noisy"].tolist(), batch["drawn"]] for batch in noisy]
    assert ("rank 1 of 2 (from environment)" if rank else "rank 0 of 1 (alone)") in shown
