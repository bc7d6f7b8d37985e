"""NumPy files as a source of a packing."""

import numpy as np
import pytest

import tiercache as tc
from tiercache.errors import SchemaError
from tiercache.packer.arrays import find_arrays
from tiercache.packer.files import find_files


def packed(tmp_path, **options):
    tc.pack(tmp_path / "in", tmp_path / "out", **options)
    return tc.Dataset(tmp_path / "out")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.mark.parametrize("dtype", ["?", "u1", ">i4", "<i8", "f2", ">f8", "U3", "S3", "M8[us]"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_files_of_a_folder_are_one_data_set_in_the_order_of_their_paths(tmp_path, folder, dtype, order):
    shape = () if dtype[0] in "USM" else (2, 5)
    values = [np.arange(n * (10 if shape else 1)).reshape(n, *shape).astype(dtype) for n in (7, 0, 40)]
    for i, part in enumerate(values):
        np.save(folder / f"{i}.npy", np.asarray(part, order=order))
    ds = packed(tmp_path)
    expected = np.concatenate(values)
    assert len(ds) == 47
    found = [record["array"] for record in ds]
    if dtype == "M8[us]":
        assert found == expected.tolist()
    else:
        assert np.array_equal(np.array(found), expected)
    assert np.asarray(found[0]).shape == shape


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_arrays_of_an_archive_are_columns_also_if_their_columns_are_stored_one_after_the_other(
    tmp_path, folder, save
):
    rng = np.random.default_rng(0)
    x, y = rng.random((5000, 30)), rng.integers(0, 9, 5000)
    save(folder / "a.npz", x=np.asfortranarray(x), y=y)
    ds = packed(tmp_path, schema={"y": "int8"}, block_size="10KiB")
    assert ds.schema.names == ("x", "y")
    assert np.array_equal(np.stack([r["x"] for r in ds]), x)
    assert [r["y"] for r in ds] == y.tolist()


def test_the_fields_of_a_structured_type_are_columns(tmp_path, folder):
    rows = np.array([(1, 2.5, [1, 2]), (3, 4.5, [3, 4])], [("a", "i2"), ("b", ">f4"), ("c", "u1", (2,))])
    np.save(folder / "a.npy", rows)
    assert [{"a": r["a"], "b": r["b"], "c": r["c"].tolist()} for r in packed(tmp_path)] == [
        {"a": 1, "b": 2.5, "c": [1, 2]},
        {"a": 3, "b": 4.5, "c": [3, 4]},
    ]


def test_a_large_file_has_several_splits_and_a_batch_has_about_the_bytes_that_are_asked_for(tmp_path):
    values = np.arange(3 << 24, dtype=np.float32).reshape(-1, 256)
    np.save(tmp_path / "a.npy", values)
    files, found, _ = find_files(tmp_path, {})
    source = find_arrays(files, found, {})
    assert [split.n_bytes for split in source.splits] == [64 << 20] * 3
    batch = next(source.read(source.splits[1], 1 << 20))
    assert batch.n_bytes == 1 << 20
    assert np.array_equal(batch.columns["array"], values[1 << 16 : (1 << 16) + 1024])


def test_what_cannot_be_packed_is_named_before_anything_is_written(tmp_path, folder):
    def fails(match, **options):
        with pytest.raises(SchemaError, match=match):
            tc.pack(folder, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    np.save(folder / "a.npy", np.array([{"x": 1}], object), allow_pickle=True)
    fails(r"a\.npy: an array of objects, which only pickle reads")
    np.save(folder / "a.npy", np.array(3))
    fails("expected an array whose first axis numbers the records")
    np.save(folder / "a.npy", np.zeros(3, complex))
    fails("values of the type complex128 cannot be packed")
    np.save(folder / "a.npy", np.zeros((3, 2)))
    fails("no such column; there are array", schema={"x": "int8"})
    np.save(folder / "b.npy", np.zeros((3, 3)))
    fails(r"b\.npy: its arrays differ from those of .*a\.npy: array: ")
    (folder / "b.npy").write_bytes((folder / "a.npy").read_bytes()[:-1])
    fails(r"b\.npy: cut off: expected 176 bytes for its header, got 175")
    (folder / "b.npy").write_text("x,y\n1,2\n")
    fails(r"b\.npy: not a readable NumPy file: .*its first bytes are b'x,y\\n1,2\\n': text")
    (folder / "b.npy").unlink()
    (folder / "a.npy").unlink()
    np.savez(folder / "a.npz", x=np.zeros(3), y=np.zeros(4))
    fails("the first axis numbers the records, so its length must be equal, got x 3, y 4")
    np.savez(folder / "a.npz")
    fails("the archive has no arrays")
    (folder / "a.npz").write_bytes(b"PK\3\4" + bytes(100))
    fails(r"a\.npz: not a readable NumPy file: .*: a zip archive")


def test_damage_inside_an_archive_is_a_bad_record_that_names_where_it_begins(tmp_path, folder):
    np.savez(folder / "a.npz", x=np.arange(1000))
    data = bytearray((folder / "a.npz").read_bytes())
    data[4000] ^= 1
    (folder / "a.npz").write_bytes(data)
    with pytest.raises(SchemaError, match=r"a\.npz, from record \d+ on: not readable: Bad CRC-32"):
        tc.pack(folder, tmp_path / "out")
