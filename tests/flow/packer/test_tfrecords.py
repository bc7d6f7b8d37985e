"""TFRecord files as a source of a packing."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tfrecord_files import example, field, tfrecords

import tiercache as tc
from tiercache.errors import SchemaError
from tiercache.packer.tfrecords import parse_example


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def records_of(folder, tmp_path, **options):
    tc.pack(folder, tmp_path / "out", **options)
    return tc.Dataset(tmp_path / "out")


FEATURE = st.one_of(
    st.lists(st.binary(max_size=5), min_size=1, max_size=4),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4).map(np.float32),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40).map(lambda values: np.array(values, np.int64)),
)


class TestExamples:
    @given(st.dictionaries(st.text(max_size=4), FEATURE, max_size=4), st.booleans())
    def test_the_features_of_an_example_are_those_that_were_written(self, features, packed):
        found = parse_example(example(features, packed=packed))
        assert found.keys() == features.keys()
        for name, values in features.items():
            assert np.array_equal(found[name], values)
            assert type(found[name]) is type(values)

    @given(st.binary(max_size=60), st.data())
    def test_other_bytes_are_an_example_or_a_value_error(self, noise, data):
        whole = example({"a": [1, 2], "b": [b"x"], "c": np.float32([1])})
        at = data.draw(st.integers(0, len(whole)))
        for changed in (noise, whole[:at], whole[:at] + noise + whole[at:]):
            try:
                parse_example(changed)
            except ValueError:
                continue

    def test_one_value_is_a_scalar_several_are_an_array_and_a_feature_that_lacks_is_null(self, tmp_path, folder):
        rows = [
            {"id": [-1], "tokens": [1, 2], "names": [b"a"], "score": np.float32([0.5])},
            {"id": [2**40], "tokens": [], "names": [b"b", b"c"]},
        ]
        (folder / "a.tfrecord").write_bytes(tfrecords([example(row) for row in rows]))
        ds = records_of(folder, tmp_path)
        assert {c.name: str(c) for c in ds.schema.columns} == {
            "id": "int64",
            "names": "list<bytes>",
            "score": "float32?",
            "tokens": "int64[*]",
        }
        found = [{**r, "tokens": r["tokens"].tolist(), "names": list(r["names"])} for r in ds]
        assert found == [
            {"id": -1, "names": [b"a"], "score": 0.5, "tokens": [1, 2]},
            {"id": 2**40, "names": [b"b", b"c"], "score": None, "tokens": []},
        ]

    def test_a_schema_makes_text_of_bytes_tensors_of_lists_and_columns_of_later_features(self, tmp_path, folder):
        rows = [{"t": [b"\xc3\xa9"], "x": [1, 2], "l": [b"a", b"b"]}] * 1200 + [{"t": [b"b"], "x": [3, 4], "l": [b"c"]}]
        rows[-1]["late"] = [7]
        (folder / "a.tfrecord").write_bytes(tfrecords([example(row) for row in rows]))
        with pytest.raises(SchemaError, match=r"record 1200: the feature 'late' is not in the first records"):
            tc.pack(folder, tmp_path / "other")
        schema = {"t": "str", "x": "int16[2]", "l": "list<str>", "late": "int8?"}
        ds = records_of(folder, tmp_path, schema=schema)
        first, last = ds[0], ds[1200]
        assert (first["t"], first["x"].tolist(), list(first["l"]), first["late"]) == ("é", [1, 2], ["a", "b"], None)
        assert (last["t"], last["x"].tolist(), list(last["l"]), last["late"]) == ("b", [3, 4], ["c"], 7)

    def test_a_list_has_the_shape_that_a_schema_states_as_by_fixed_len_feature(self, tmp_path, folder):
        rows = [{"m": np.float32([i, 1, 2, 3, 4, 5])} for i in range(10)] + [{"m": np.float32([1, 2])}]
        (folder / "a.tfrecord").write_bytes(tfrecords([example(row) for row in rows]))
        with pytest.warns(UserWarning, match="1 bad records"):
            ds = records_of(folder, tmp_path, schema={"m": "float32[2, 3]"}, on_error="skip")
        assert len(ds) == 10
        assert ds[7]["m"].tolist() == [[7, 1, 2], [3, 4, 5]]

    def test_records_that_are_no_examples_are_a_column_of_bytes(self, tmp_path, folder):
        sequence = field(1, b"") + field(2, field(1, b"x"))  # a tf.train.SequenceExample
        records = [b"\xff" * 9, b"", sequence]
        (folder / "a.tfrecord").write_bytes(tfrecords(records))
        assert [r["bytes"] for r in records_of(folder, tmp_path)] == records
        with pytest.raises(SchemaError, match=r"not a tf\.train\.Example, so the only column is 'bytes'"):
            tc.pack(folder, tmp_path / "other", schema={"x": "int8"})

    def test_features_whose_kinds_differ_are_an_error_that_names_the_record(self, tmp_path, folder):
        (folder / "a.tfrecord").write_bytes(tfrecords([example({"x": [1]}), example({"x": [b"1"]})]))
        with pytest.raises(SchemaError, match=r"record 1: expected int64 as in earlier records, got bytes"):
            tc.pack(folder, tmp_path / "out")


class TestDamage:
    def bad_records(self, folder, tmp_path):
        with pytest.warns(UserWarning, match="bad records"):
            version = tc.pack(folder, tmp_path / "out", on_error="skip", mode="overwrite")
        lines = (tmp_path / "out.bad.jsonl").read_text().splitlines()
        bad = [json.loads(line) for line in lines]
        return version.n_records, [(b["location"].rpartition(", ")[2], b["reason"]) for b in bad]

    def test_a_record_with_a_wrong_checksum_is_bad_and_a_wrong_length_ends_the_file(self, tmp_path, folder):
        whole = tfrecords([example({"x": [i]}) for i in range(10)])
        size = len(whole) // 10
        path = folder / "a.tfrecord"
        damaged = bytearray(whole)
        damaged[3 * size + 14] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(SchemaError, match="record 3: the checksum of its bytes is wrong"):
            tc.pack(folder, tmp_path / "other")
        assert self.bad_records(folder, tmp_path) == (9, [("record 3", "the checksum of its bytes is wrong")])
        damaged[5 * size + 7] ^= 0x7F  # a length of 2**62: no memory is reserved for it
        path.write_bytes(damaged)
        assert self.bad_records(folder, tmp_path) == (
            4,
            [
                ("record 3", "the checksum of its bytes is wrong"),
                ("from record 5 on", "the checksum of its length is wrong"),
            ],
        )

    @pytest.mark.parametrize("is_gzip", [False, True])
    def test_the_whole_records_of_a_file_that_is_cut_off_are_packed(self, tmp_path, folder, is_gzip):
        rng = np.random.default_rng(0)
        whole = tfrecords([example({"x": [rng.bytes(100)]}) for i in range(1000)])
        whole = gzip.compress(whole) if is_gzip else whole
        (folder / "a.tfrecord").write_bytes(whole[:-150])
        n, bad = self.bad_records(folder, tmp_path)
        assert n == 998
        (bad,) = bad
        assert bad[0] == "from record 998 on"
        assert bad[1].startswith("damaged gzip file" if is_gzip else "the file ends inside")

    def test_a_file_that_is_no_tfrecord_file_is_named_before_anything_is_written(self, tmp_path, folder):
        (folder / "a.tfrecord").write_bytes(tfrecords([example({"x": [1]})] * 2000))
        (folder / "b.tfrecord").write_text('{"x": 1}\n')
        with pytest.raises(SchemaError, match=r"b\.tfrecord: not a TFRecord file: .*b'{\"x\": 1}\\n': text"):
            tc.pack(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
