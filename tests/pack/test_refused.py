"""What pack() refuses, names, or keeps, of a source that is more than plain files of one kind."""

import io
import json
import os
import struct
import tarfile
from contextlib import closing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.pack.pictures import jpeg, png
from typer.testing import CliRunner

import tiercache as tc
from tiercache.cli import app
from tiercache.errors import NotFound, SchemaError
from tiercache.pack.executor import pack
from tiercache.pack.images import find_damage, sniff
from tiercache.pack.plan import PackOptions, plan_pack

MDS_INDEX = {"version": 2, "shards": [{"column_encodings": ["int"], "raw_data": {"basename": "shard.00000.mds"}}]}
LITDATA_INDEX = {"chunks": [{"chunk_bytes": 10, "filename": "chunk-0-0.bin"}], "config": {"data_format": ["int"]}}


class TestOtherFormats:
    @pytest.mark.parametrize("kind", [None, "jsonl"])
    @pytest.mark.parametrize(
        ("index", "other", "name"),
        [
            (json.dumps(MDS_INDEX), "shard.00000.mds", "MosaicML"),
            (json.dumps(MDS_INDEX, sort_keys=True), "shard.00000.mds", "MosaicML"),
            (json.dumps(MDS_INDEX, indent=2), "shard.00000.mds.zstd", "MosaicML"),
            (json.dumps(LITDATA_INDEX), "chunk-0-0.bin", "LitData"),
        ],
    )
    def test_an_index_of_another_library_is_not_packed_as_a_record(self, tmp_path, index, other, name, kind):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "index.json").write_text(index)
        (tmp_path / "in" / other).write_bytes(bytes(100))
        with pytest.raises(SchemaError, match=name):
            pack(tmp_path / "in", tmp_path / "out", kind=kind)
        assert not (tmp_path / "out" / "_tiercache").exists()

    def test_an_index_of_records_is_packed(self, tmp_path):
        (tmp_path / "index.json").write_text('{"shards": 3}\n{"shards": 4}\n')
        assert pack(tmp_path, tmp_path / "out").n_records == 2

    @pytest.mark.parametrize(
        "name",
        ["a.tar", "a.tar.gz", "a.tgz", "a.beton", "a.tfrecord-00000-of-00004", "a.arrow", "a.lance", "a.h5", "a.npy"],
    )
    def test_files_of_another_format_are_refused_by_name_beside_files_that_can_be_packed(self, tmp_path, name):
        (tmp_path / "good.jsonl").write_text('{"x": 1}\n')
        (tmp_path / name).write_bytes(bytes(600))
        with pytest.raises(SchemaError, match="this is") as caught:
            plan_pack(tmp_path, tmp_path / "out", PackOptions())
        assert name in str(caught.value)
        assert pack(tmp_path, tmp_path / "out", exclude=[name]).n_records == 1

    def test_a_named_kind_packs_its_files_and_names_the_others(self, tmp_path):
        (tmp_path / "good.jsonl").write_text('{"x": 1}\n')
        (tmp_path / "a.tar").write_bytes(bytes(600))
        with pytest.warns(UserWarning, match=r"a\.tar"):
            assert pack(tmp_path, tmp_path / "out", kind="jsonl").n_records == 1

    def test_a_single_file_without_a_known_name_is_recognised_by_its_first_bytes(self, tmp_path):
        with tarfile.open(tmp_path / "archive", "w") as archive:
            archive.addfile(tarfile.TarInfo("x"), io.BytesIO())
        with (tmp_path / "array.dat").open("wb") as file:
            np.save(file, np.zeros(3))
        for name, what in (("archive", "tar archive"), ("array.dat", "NumPy")):
            with pytest.raises(SchemaError, match=what):
                plan_pack(tmp_path / name, tmp_path / "out", PackOptions())


class TestLeftOut:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "in"
        folder.mkdir()
        (folder / "a.jsonl").write_text('{"x": 1}\n')
        (folder / "gone.jsonl").symlink_to(folder / "nowhere")
        os.mkfifo(folder / "pipe.jsonl")
        (folder / "README.md").write_text("read me")
        (folder / "_SUCCESS").write_text("")
        (folder / ".hidden").write_text("")
        return folder

    def test_links_to_nothing_pipes_and_files_of_no_kind_are_named(self, folder, tmp_path):
        left_out = {one.path: one.reason for one in plan_pack(folder, tmp_path / "out", PackOptions()).skipped}
        assert left_out.keys() == {"gone.jsonl", "pipe.jsonl", "README.md"}
        assert "nowhere" in left_out["gone.jsonl"]
        with pytest.warns(UserWarning, match=r"gone\.jsonl.*pipe\.jsonl.*README\.md"):
            assert pack(folder, tmp_path / "out").n_records == 1

    def test_the_command_names_them_too(self, folder, tmp_path):
        done = CliRunner().invoke(app, ["pack", str(folder), str(tmp_path / "out"), "--json"])
        events = [json.loads(line) for line in done.stdout.splitlines()]
        assert {e["path"] for e in events if e["event"] == "left_out"} == {"gone.jsonl", "pipe.jsonl", "README.md"}
        text = CliRunner().invoke(app, ["pack", str(folder), str(tmp_path / "other")]).stdout
        assert all(name in text for name in ("gone.jsonl", "pipe.jsonl", "README.md"))

    def test_what_exclude_names_is_not_named_again(self, folder, tmp_path):
        exclude = ["gone.jsonl", "pipe.jsonl", "README.md"]
        assert plan_pack(folder, tmp_path / "out", PackOptions(exclude=exclude)).skipped == ()
        assert pack(folder, tmp_path / "out", exclude=exclude).n_records == 1

    def test_a_folder_of_links_to_nothing_is_not_empty_without_a_reason(self, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.jsonl").symlink_to(tmp_path / "nowhere")
        with pytest.raises(NotFound, match="nowhere"):
            plan_pack(tmp_path / "in", tmp_path / "out", PackOptions())


class TestHivePartitions:
    def write(self, folder, path, table):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), folder / path)

    def test_partitions_become_columns_as_pyarrow_reads_them(self, tmp_path):
        table = pa.table(
            {"x": list(range(12)), "year": [2023, 2024] * 6, "month": [1, 2, 3] * 4, "site": ["a b", "c/d", None] * 4}
        )
        pq.write_to_dataset(table, tmp_path / "in", partition_cols=["year", "month", "site"])
        version = pack(tmp_path / "in", tmp_path / "out")
        assert [(c.name, str(c)) for c in version.schema.columns] == [
            ("x", "int64"),
            ("year", "int64"),
            ("month", "int64"),
            ("site", "str?"),
        ]
        with closing(tc.Dataset(tmp_path / "out")) as dataset:
            packed = {r["x"]: (r["year"], r["month"], r["site"]) for r in (dataset[i] for i in range(len(dataset)))}
        assert packed == {r["x"]: (r["year"], r["month"], r["site"]) for r in table.to_pylist()}

    def test_a_given_type_decides_how_a_partition_is_read(self, tmp_path):
        self.write(tmp_path / "in", "id=007/a.parquet", {"x": [1]})
        version = pack(tmp_path / "in", tmp_path / "out", schema={"id": "str"})
        assert str(version.schema.columns[1]) == "str"
        with closing(tc.Dataset(tmp_path / "out")) as dataset:
            assert dataset[0]["id"] == "007"
        self.write(tmp_path / "in", "id=eight/a.parquet", {"x": [1]})
        with pytest.raises(SchemaError, match="eight"):
            pack(tmp_path / "in", tmp_path / "other", schema={"id": "int32"})

    def test_a_column_that_the_files_hold_themselves_keeps_its_stored_values(self, tmp_path):
        self.write(tmp_path / "in", "year=2024/a.parquet", {"x": [1], "year": [1999]})
        pack(tmp_path / "in", tmp_path / "out")
        with closing(tc.Dataset(tmp_path / "out")) as dataset:
            assert (dataset[0]["x"], dataset[0]["year"]) == (1, 1999)

    def test_files_with_other_partition_columns_are_refused(self, tmp_path):
        self.write(tmp_path / "in", "year=2024/a.parquet", {"x": [1]})
        self.write(tmp_path / "in", "b.parquet", {"x": [1]})
        with pytest.raises(SchemaError, match="'year'"):
            plan_pack(tmp_path / "in", tmp_path / "out", PackOptions())

    def test_json_lines_have_partitions_too(self, tmp_path):
        for day in (1, 2):
            (tmp_path / "in" / f"day={day}").mkdir(parents=True)
            (tmp_path / "in" / f"day={day}" / "a.jsonl").write_text('{"x": 5}\n')
        pack(tmp_path / "in", tmp_path / "out")
        with closing(tc.Dataset(tmp_path / "out")) as dataset:
            assert [(dataset[i]["x"], dataset[i]["day"]) for i in range(2)] == [(5, 1), (5, 2)]


def saved(encoding: str, **options) -> bytes:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    buffer = io.BytesIO()
    image.fromarray(pixels).save(buffer, encoding, **options)
    return buffer.getvalue()


WHOLE = {
    "jpeg": [{}, {"progressive": True}, {"comment": b"\xff\xd9" * 5}],
    "png": [{}, {"compress_level": 0}],
    "webp": [{}, {"lossless": True}],
}


class TestImages:
    @pytest.mark.parametrize(("encoding", "options"), [(e, o) for e, all_of in WHOLE.items() for o in all_of])
    def test_images_as_pillow_writes_them_are_whole_and_cut_off_ones_are_not(self, encoding, options):
        data = saved(encoding, **options)
        assert sniff(data) == encoding
        assert find_damage(data, encoding) is None
        assert find_damage(data + bytes(7), encoding) is None
        for kept in (0.2, 0.5, 0.9):
            assert find_damage(data[: int(len(data) * kept)], encoding) is not None
        assert find_damage(data[:20], encoding) is not None

    def test_an_end_marker_in_a_thumbnail_does_not_stand_for_the_images(self):
        whole = jpeg(payload=jpeg())
        assert find_damage(whole, "jpeg") is None
        assert find_damage(whole[:-2], "jpeg") is not None

    def test_an_image_of_no_pixels_is_damaged(self):
        assert find_damage(png(width=0), "png") is not None
        without_pixels = png()[:33] + png()[-12:]
        assert find_damage(without_pixels, "png") is not None

    @given(encoding=st.sampled_from(sorted(WHOLE)), data=st.data())
    def test_changed_bytes_are_never_an_error_of_the_check_itself(self, encoding, data):
        image = bytearray(saved(encoding))
        for _ in range(data.draw(st.integers(1, 4))):
            image[data.draw(st.integers(8, min(len(image) - 1, 200)))] = data.draw(st.integers(0, 255))
        image = image[: data.draw(st.integers(12, len(image)))]
        find_damage(bytes(image), encoding)

    @pytest.mark.parametrize(
        ("name", "data"),
        [
            ("a.png", png(b"x" * 100)[:20]),
            ("b.png", png(b"x" * 100)[:-12]),
            ("c.png", b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 5, b"nope") + bytes(9)),
        ],
    )
    def test_a_damaged_image_is_named_and_nothing_is_packed(self, tmp_path, name, data):
        (tmp_path / "in" / "cat").mkdir(parents=True)
        (tmp_path / "in" / "cat" / "whole.png").write_bytes(png())
        (tmp_path / "in" / "cat" / name).write_bytes(data)
        with pytest.raises(SchemaError, match="incomplete png") as caught:
            pack(tmp_path / "in", tmp_path / "out")
        assert name in str(caught.value)
        assert not (tmp_path / "out" / "_tiercache").exists()
