"""Folders in which each file is a record: images and other files, with labels from folders, names and tables."""

import io
import json
import pickle
from typing import ClassVar

import numpy as np
import pytest
from tests.flow.packer.test_packing import is_empty, read
from tests.support.image_files import jpeg, png
from typer.testing import CliRunner

from tiercache.cli.app import app
from tiercache.data.dataset import Dataset
from tiercache.errors import SchemaError
from tiercache.packer.pack import pack
from tiercache.packer.plan import PackOptions, plan_pack


def write(root, files):
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def photo(mode="RGB", encoding="JPEG", **options):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    buffer = io.BytesIO()
    image.fromarray(pixels).convert(mode).save(buffer, encoding, **options)
    return buffer.getvalue()


class TestLabels:
    def test_the_first_folder_is_the_class_however_deep_a_file_of_any_encoding_lies(self, tmp_path):
        exif = pytest.importorskip("PIL.Image").Exif()
        exif[274] = 6  # orientation: rotated
        files = {
            "cat/1.png": png(),
            "cat/old/1990/2.jpg": photo(exif=exif),
            "cat/a.jpeg": png(b"a PNG, whatever its name says"),
            "dog/3.webp": photo(encoding="WEBP"),
        }
        version = pack(write(tmp_path / "in", files), tmp_path / "out")
        assert {c.name: str(c) for c in version.schema.columns} == {"image": "image", "label": "int64", "path": "str"}
        assert version.schema.columns[1].classes == ("cat", "dog")
        assert [(r["path"], r["label"], r["image"]) for r in read(tmp_path / "out")] == [
            (path, int(path.startswith("dog")), files[path]) for path in sorted(files)
        ]

    def test_a_flat_folder_has_images_and_paths_alone(self, tmp_path):
        folder = write(tmp_path / "in", {"b.png": png(b"b"), "a.png": png(b"a")})
        version = pack(folder, tmp_path / "out")
        assert version.schema.names == ("image", "path")
        assert [r["path"] for r in read(tmp_path / "out")] == ["a.png", "b.png"]

    def test_a_flat_file_beside_the_folders_of_classes_is_an_error_that_says_how_many_there_are(self, tmp_path):
        folder = write(tmp_path / "in", {"cat/1.png": png(), "2.png": png(), "3.png": png()})
        with pytest.raises(SchemaError, match=r"2\.png: 2 of 3 files lie beside the sub-folders"):
            pack(folder, tmp_path / "out")
        assert is_empty(tmp_path / "out")

    @pytest.mark.parametrize("pattern", ["(?P<label>[a-z]+)_[0-9]+", "([a-z]+)_[0-9]", "x?(?P<label>cat|dog)"])
    def test_a_pattern_finds_the_class_in_the_name(self, tmp_path, pattern):
        folder = write(tmp_path / "in", {f"{name}.png": png() for name in ("cat_1", "dog_1", "cat_2")})
        version = pack(folder, tmp_path / "out", label_pattern=pattern)
        assert version.schema.columns[1].classes == ("cat", "dog")
        assert [r["label"] for r in read(tmp_path / "out")] == [0, 0, 1]

    def test_a_pattern_without_a_match_is_an_error_that_names_the_file(self, tmp_path):
        folder = write(tmp_path / "in", {"cat_1.png": png(), "plain.png": png()})
        for pattern, message in (
            ("([a-z]+)_", r"plain\.png: its path does not match"),
            ("(bird)_", "matches none of 2 paths, such as 'cat_1.png'"),
            ("[a-z", "not a regular expression"),
            ("[a-z]+", "needs a group"),
        ):
            with pytest.raises(ValueError, match=message):
                pack(folder, tmp_path / "out", label_pattern=pattern)
        assert is_empty(tmp_path / "out")

    def test_classes_state_the_numbers_of_labels_and_text_stays_text_on_request(self, tmp_path):
        folder = write(tmp_path / "in", {"dog/1.png": png(), "emu/1.png": png()})
        version = pack(folder, tmp_path / "out", classes={"label": ["emu", "cat", "dog"]})
        assert version.schema.columns[1].classes == ("emu", "cat", "dog")
        assert [r["label"] for r in read(tmp_path / "out")] == [2, 0]
        with pytest.raises(SchemaError, match="class 'emu' is not among the 2 classes 'cat', 'dog'"):
            pack(folder, tmp_path / "other", classes={"label": ["cat", "dog"]})
        pack(folder, tmp_path / "text", schema={"label": "str"})
        assert [r["label"] for r in read(tmp_path / "text")] == ["dog", "emu"]


ROWS = ((3, "cat", 0.5), (1, "dog", 1.5), (2, "cat", 2.5))


class TestTables:
    FILES: ClassVar = {"b/2.png": png(b"2"), "a/1.png": png(b"1"), "3.png": png(b"3")}

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("labels.csv", "file,label,weight\n3.png,cat,0.5\na/1.png,dog,1.5\nb/2.png,cat,2.5\n"),
            ("labels.csv", "label,weight,file\ncat,0.5,3.png\ndog,1.5,1.png\ncat,2.5,2.png\n"),
            ("labels.csv", "id,label,weight\n3,cat,0.5\n1,dog,1.5\n2,cat,2.5\n"),
            (
                "labels.jsonl",
                "".join(json.dumps({"f": f"{i}.png", "label": n, "weight": w}) + "\n" for i, n, w in ROWS),
            ),
        ],
    )
    def test_a_table_names_files_by_path_name_or_stem_and_its_other_columns_are_kept(self, tmp_path, name, text):
        folder = write(tmp_path / "in", self.FILES)
        (folder / name).write_text(text)
        version = pack(folder, tmp_path / "out", labels=folder / name)
        assert version.schema.names == ("image", "label", "weight", "path")
        assert version.schema.columns[1].classes == ("cat", "dog")
        assert [(r["path"], r["label"], r["weight"]) for r in read(tmp_path / "out")] == [
            ("3.png", 0, 0.5),
            ("a/1.png", 1, 1.5),
            ("b/2.png", 0, 2.5),
        ]
        assert Dataset(tmp_path / "out").classes == ["cat", "dog"]

    def test_a_file_without_a_row_is_bad_and_a_row_without_a_file_is_reported(self, tmp_path):
        folder = write(tmp_path / "in", self.FILES)
        labels = tmp_path / "labels.csv"
        labels.write_text("file,label\n3.png,cat\n1.png,dog\n9.png,dog\n")
        missing = pytest.raises(SchemaError, match=r"b/2\.png: no row of .*labels\.csv names it")
        with pytest.warns(UserWarning, match=r"9\.png"), missing:
            pack(folder, tmp_path / "out", labels=labels)
        plan = plan_pack(folder, tmp_path / "out", PackOptions(labels=labels))
        assert [(one.path, "row 3 names it, but it does not exist" in one.reason) for one in plan.skipped] == [
            ("9.png", True)
        ]
        labels.write_text("file,label\n3.png,cat\n3.png,dog\n")
        with pytest.raises(SchemaError, match=r"row 2: a second row for '3\.png'"):
            pack(folder, tmp_path / "out", labels=labels)
        labels.write_text("file,label\nnot/there,cat\n")
        with pytest.raises(SchemaError, match=r"no column names the files: its first row is .*not/there"):
            pack(folder, tmp_path / "out", labels=labels)

    def test_boxes_of_json_lines_become_arrays(self, tmp_path):
        folder = write(tmp_path / "in", {"1.png": png(), "2.png": png()})
        labels = tmp_path / "labels.jsonl"
        rows = [{"file": "1.png", "boxes": [1, 2, 3, 4]}, {"file": "2.png", "boxes": []}]
        labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pack(folder, tmp_path / "out", labels=labels)
        assert [r["boxes"].tolist() for r in read(tmp_path / "out")] == [[1, 2, 3, 4], []]


class TestFiles:
    def test_files_of_any_kind_are_records_of_bytes_and_path(self, tmp_path):
        files = {"a/x.bin": bytes(range(256)), "b.txt": b"text", "empty": b""}
        folder = write(tmp_path / "in", {**files, "Thumbs.db": b"junk", "a/x.bin.crc": b"junk", "_SUCCESS": b""})
        version = pack(folder, tmp_path / "out", kind="files")
        assert {c.name: str(c) for c in version.schema.columns} == {"bytes": "bytes", "path": "str"}
        assert {r["path"]: r["bytes"] for r in read(tmp_path / "out")} == files
        pack(folder, tmp_path / "labelled", kind="files", label_pattern=r"([a-z]+)$")
        assert [r["label"] for r in read(tmp_path / "labelled")] == [0, 2, 1]  # bin, txt, empty

    def test_options_of_folders_are_refused_for_tables(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
        with pytest.raises(ValueError, match="label_pattern= applies to folders"):
            pack(tmp_path / "a.jsonl", tmp_path / "out", label_pattern="(x)")


def test_junk_files_are_ignored_and_other_files_beside_images_are_reported(tmp_path):
    folder = write(tmp_path / "in", {"a/1.png": png(), "a/notes.txt": b"x"})
    write(folder, {"a/Thumbs.db": b"x", "a/desktop.ini": b"x", "__MACOSX/a/1.png": b"x", "a/.DS_Store": b"x"})
    plan = plan_pack(folder, tmp_path / "out", PackOptions())
    assert [(one.path, one.reason) for one in plan.skipped] == [("a/notes.txt", "its name is not that of an image")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GARBAGE", "not an image in a supported format: it starts with b'GARBAGE'"),
        (b"", "not an image in a supported format: it is empty"),
        (png(b"x" * 100)[:20], "incomplete png"),
    ],
)
def test_a_file_that_is_no_whole_image_is_named(tmp_path, data, message):
    folder = write(tmp_path / "in", {"cat/1.png": png(), "cat/a.png": data})
    with pytest.raises(SchemaError, match=rf"cat/a\.png: {message}"):
        pack(folder, tmp_path / "out")
    assert is_empty(tmp_path / "out")


def test_images_are_decoded_on_request(tmp_path):
    pytest.importorskip("cv2")
    folder = write(tmp_path / "in", {"cat/1.jpg": photo(), "cat/2.jpg": jpeg()})  # the scan of 2.jpg is not one
    assert pack(folder, tmp_path / "out").n_records == 2
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "out")]).exit_code == 0
    found = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--decode"])
    assert found.exit_code == 4
    assert "record 1 of the block: it cannot be decoded" in found.output
    with pytest.raises(SchemaError, match=r"2\.jpg: it cannot be decoded"):
        pack(folder, tmp_path / "checked", check_images=True)
    done = CliRunner().invoke(app, ["pack", str(folder), str(tmp_path / "command"), "--check-images"])
    assert done.exit_code == 1
    assert "2.jpg: it cannot be decoded" in done.output


def test_a_source_with_labels_can_be_pickled_and_its_text_shows_whether_the_labels_are_the_same(tmp_path):
    folder = write(tmp_path / "in", {"1.png": png(), "2.png": png()})
    labels = tmp_path / "labels.csv"
    shown = []
    for text in ("file,label\n1.png,a\n2.png,b\n", "file,label\n1.png,b\n2.png,a\n"):
        labels.write_text(text)
        source = plan_pack(folder, tmp_path / "out", PackOptions(labels=labels)).source
        assert pickle.loads(pickle.dumps(source)) == source
        shown.append(repr(source))
    assert shown[0] != shown[1]
