"""Files that pack() refuses or skips: other formats, dangling links, damaged images."""

import gzip
import io
import json
import os
import re
import struct

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.image_files import png
from typer.testing import CliRunner

from tiercache.cli.app import app
from tiercache.errors import NotFound, SchemaError
from tiercache.packer.images import find_damage, sniff
from tiercache.packer.pack import pack
from tiercache.packer.plan import PackOptions, plan_pack

MDS_INDEX = {"version": 2, "shards": [{"column_encodings": ["int"], "raw_data": {"basename": "shard.00000.mds"}}]}
LITDATA_INDEX = {"chunks": [{"chunk_bytes": 10, "filename": "chunk-0-0.bin"}], "config": {"data_format": ["int"]}}


class TestOtherFormats:
    @pytest.mark.parametrize("kind", ["parquet", "jsonl"])
    def test_an_index_of_another_library_is_not_packed_as_another_kind(self, tmp_path, kind):
        (tmp_path / "in").mkdir()
        for index, other, name in (
            (json.dumps(MDS_INDEX), "shard.00000.mds", "MosaicML"),
            (json.dumps(MDS_INDEX, sort_keys=True), "shard.00000.mds", "MosaicML"),
            (json.dumps(MDS_INDEX, indent=2), "shard.00000.mds.zstd", "MosaicML"),
            (json.dumps(LITDATA_INDEX), "chunk-0-0.bin", "LitData"),
        ):
            (tmp_path / "in" / "index.json").write_text(index)
            (tmp_path / "in" / other).write_bytes(bytes(100))
            with pytest.raises(SchemaError, match=name):
                pack(tmp_path / "in", tmp_path / "out", kind=kind)
            assert not (tmp_path / "out" / "_tiercache").exists()

    def test_files_of_another_format_are_refused_by_name_beside_files_that_can_be_packed(self, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "good.jsonl").write_text('{"x": 1}\n')
        for name in (
            "a.tar.gz",
            "a.tgz",
            "a.beton",
            "a.array_record-00000-of-00004",
            "a.mds",
            "a.h5",
            "a.lance",
        ):
            (tmp_path / "in" / name).write_bytes(bytes(600))
            with pytest.raises(SchemaError, match="this is") as caught:
                plan_pack(tmp_path / "in", tmp_path / "other", PackOptions())
            assert name in str(caught.value)
            assert plan_pack(tmp_path / "in", tmp_path / "other", PackOptions(exclude=[name])).skipped == ()
            with pytest.warns(UserWarning, match=name):
                assert pack(tmp_path / "in", tmp_path / "out", kind="jsonl", mode="overwrite").n_records == 1
            (tmp_path / "in" / name).unlink()


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("b.csv", b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG image"),
        ("b.csv", "a,b\n1,2\n".encode("utf-16"), "text in UTF-16"),
        ("b.csv", b"x\0y", "no known format"),
        ("b.csv.gz", b"a,b\n1,2\n", "text"),
        ("b.jsonl", gzip.compress(b'{"a": 1}\n', mtime=0), "gzip"),
        ("b.jsonl", b"PAR1" + bytes(50), "Parquet"),
        ("b.jsonl.gz", b'{"a": 1}\n', "text"),
        ("b.parquet", b'{"a": 1}\n', "text"),
        ("b.feather", b"a,b\n1,2\n", "text"),
        ("b.orc", b"PK\3\4" + bytes(50), "a zip archive"),
        ("b.parquet", b"", "the file is empty"),
    ],
)
def test_a_file_whose_name_lies_is_an_error_that_says_what_its_first_bytes_are(tmp_path, name, content, found):
    folder = tmp_path / "in"
    folder.mkdir()
    table = pa.table({"a": range(2000)})
    writers = {
        "csv": pyarrow.csv.write_csv,
        "jsonl": lambda table, path: path.write_text("".join(f'{{"a": {i}}}\n' for i in range(len(table)))),
        "parquet": pyarrow.parquet.write_table,
        "feather": pyarrow.feather.write_feather,
        "orc": pyarrow.orc.write_table,
    }
    kind = name.split(".")[1]
    writers[kind](table, folder / f"a.{kind}")
    (folder / name).write_bytes(content)
    with pytest.raises(SchemaError, match=rf"/{re.escape(name)}: .*{found}"):
        pack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dangling_links_pipes_and_other_files_are_named(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    with pytest.raises(NotFound, match="nowhere"):
        plan_pack(folder, tmp_path / "out", PackOptions())
    (folder / "a.jsonl").write_text('{"x": 1}\n')
    os.mkfifo(folder / "pipe.jsonl")
    for other in ("README.md", "_SUCCESS", ".hidden"):
        (folder / other).write_text("")
    left_out = {one.path: one.reason for one in plan_pack(folder, tmp_path / "out", PackOptions()).skipped}
    assert left_out.keys() == {"gone.jsonl", "pipe.jsonl", "README.md"}
    assert "nowhere" in left_out["gone.jsonl"]
    assert plan_pack(folder, tmp_path / "out", PackOptions(exclude=list(left_out))).skipped == ()
    done = CliRunner().invoke(app, ["pack", str(folder), str(tmp_path / "out"), "--json"])
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert {e["path"] for e in events if e["event"] == "left_out"} == left_out.keys()
    text = CliRunner().invoke(app, ["pack", str(folder), str(tmp_path / "other")]).stdout
    assert all(name in text for name in left_out)


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
    def test_cut_off_images_are_found(self):
        for encoding, options in [(e, o) for e, all_of in WHOLE.items() for o in all_of]:
            data = saved(encoding, **options)
            assert sniff(data) == encoding
            assert find_damage(data, encoding) is None
            assert find_damage(data + bytes(7), encoding) is None
            for kept in (0.2, 0.5, 0.9):
                assert find_damage(data[: int(len(data) * kept)], encoding) is not None
            assert find_damage(data[:20], encoding) is not None
        no_header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 5, b"nope") + bytes(9)
        for damaged in (png(b"x" * 100)[:20], png(b"x" * 100)[:-12], no_header):
            assert find_damage(damaged, "png") is not None

    @given(encoding=st.sampled_from(sorted(WHOLE)), data=st.data())
    def test_the_check_of_an_image_never_raises(self, encoding, data):
        image = bytearray(saved(encoding))
        for _ in range(data.draw(st.integers(1, 4))):
            image[data.draw(st.integers(8, min(len(image) - 1, 200)))] = data.draw(st.integers(0, 255))
        image = image[: data.draw(st.integers(12, len(image)))]
        find_damage(bytes(image), encoding)
