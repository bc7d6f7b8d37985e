"""pack, info, head, export."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiercache.distribution import __version__
from tiercache.shard.versions import Commit


def test_the_version_is_printed(tiercache):
    assert tiercache("--version").out == f"tiercache {__version__}\n"


class TestPack:
    def test_pack_prints_the_new_version(self, tiercache, photos, tmp_path):
        done = tiercache("pack", photos, tmp_path / "out")
        assert done.out.startswith(f"{tmp_path}/out: version 1 has 20 records in 1 shard, ")
        assert done.err == ""
        summary = tiercache("pack", photos, tmp_path / "out", "--mode", "append", "--include", "cat", "--json").events[
            -1
        ]
        assert (summary["event"], summary["version"], summary["records"], summary["shards"]) == ("summary", 2, 30, 2)

    def test_the_same_command_again_says_that_nothing_was_left_to_do(self, tiercache, photos, tmp_path):
        target = tmp_path / "out"
        assert "packed before" not in tiercache("pack", photos, target).out
        first, last = tiercache("pack", photos, target).out.splitlines()
        assert first.startswith(
            f"{target}: packed before, from the same source with the same options; --mode overwrite"
        )
        assert last.startswith(f"{target}: version 1 has 20 records")
        dry = tiercache("pack", photos, target, "--dry-run", "--json").events
        assert [event["event"] for event in dry] == ["unchanged", "column", "column", "column", "summary"]
        assert tiercache("pack", photos, target, "--dry-run").out.splitlines()[-1] == f"would leave {target} as it is"

    def test_a_dry_run_prints_the_columns_and_writes_nothing(self, tiercache, photos, tmp_path):
        done = tiercache("pack", photos, tmp_path / "out", "--dry-run", "-w2")
        assert done.out.splitlines()[:3] == ["image: image", "label: int64", "path: str"]
        assert f"would create {tmp_path}/out from 21.1 KiB of source, in 1 process" in done.out
        assert not (tmp_path / "out").exists()

    def test_column_types_can_be_given(self, tiercache, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"x": 1, "v": [1, 2]}\n')
        flags = ["--column", "x=int8?", "--column", "v=float32[2]"]
        tiercache("pack", tmp_path / "a.jsonl", tmp_path / "out", *flags)
        columns = tiercache("info", tmp_path / "out", "--json").events[0]["columns"]
        assert columns == [{"name": "x", "type": "int8?"}, {"name": "v", "type": "float32[2]"}]

    def test_a_data_set_is_packed_by_its_path(self, tiercache, data_set, tmp_path):
        tiercache("pack", data_set, tmp_path / "out", "--columns", "label,path", "--column", "label=int8")
        tiercache("pack", tmp_path / "out", tmp_path / "out", "--mode", "append")
        facts = tiercache("info", tmp_path / "out", "--json").events[0]
        assert (facts["records"], [column["type"] for column in facts["columns"]]) == (40, ["int8", "str"])
        before, after = (tiercache("head", u, "-n20", "--json").events[:-1] for u in (data_set, tmp_path / "out"))
        assert [event["record"]["path"] for event in after] == [event["record"]["path"] for event in before]
        refused = tiercache("pack", data_set, tmp_path / "other", "--exclude", "*.png", code=2)
        assert "--exclude is for files; the source is a data set of tiercache" in refused.err

    def test_errors_are_one_line_with_an_exit_code(self, tiercache, photos, data_set, tmp_path):
        done = tiercache("pack", photos, data_set, code=1)
        assert done.err.count("\n") == 1
        assert done.err.startswith(f"tiercache: error: {data_set}: a data set exists already")
        assert tiercache("pack", tmp_path / "gone", tmp_path / "out", code=1).err.endswith("no such file or folder\n")
        wrong_size = tiercache("pack", photos, tmp_path / "out", "--shard-size", "big", code=2)
        assert "--shard-size: not a size: 'big'" in wrong_size.err
        wrong_mode = tiercache("pack", photos, tmp_path / "out", "--mode", "x", code=2)
        assert "--mode must be 'create', 'append' or 'overwrite'" in wrong_mode.err

    def test_errors_name_flags_and_not_arguments(self, tiercache, photos, data_set, tmp_path):
        def said(*arguments):
            code = 2 if "--kind" in arguments else 1
            return tiercache("pack", *arguments, code=code).err

        target = tmp_path / "out"
        assert "write with --mode append to add to it, or --mode overwrite to replace it" in said(photos, data_set)
        assert "--include and --exclude leave none of the 20 files" in said(photos, target, "--exclude", "*.png")
        assert "--kind must be one of images, " in said(photos, target, "--kind", "x")
        (tmp_path / "a.jsonl").write_text('{"x": null}\n')
        assert "specify its type, as in --column 'x=str?'" in said(tmp_path / "a.jsonl", target)
        assert "No such option" in tiercache("pack", photos, tmp_path / "out", "--shards", "1", code=2).err

    def test_ctrl_c_while_it_commits_says_that_the_same_command_continues(
        self, tiercache, photos, tmp_path, monkeypatch
    ):
        def struck(*_given, **_named):
            raise KeyboardInterrupt

        monkeypatch.setattr(Commit, "run", struck)
        said = tiercache("pack", photos, tmp_path / "out", code=130).err
        assert said == "tiercache: interrupted: the same command continues, and keeps what is finished\n"


class TestListing:
    def test_shards_of_an_older_version_are_listed(self, tiercache, photos, data_set):
        tiercache("pack", photos, data_set, "--mode", "overwrite", "--include", "cat")
        assert tiercache("info", data_set, "--shards", "--at", "1", "--json").events[-1]["records"] == 20
        assert "no version 9" in tiercache("info", data_set, "--shards", "--at", "9", code=1).err

    def test_info_shows_version_size_and_columns(self, tiercache, data_set):
        text = tiercache("info", data_set).out
        assert "records      20\n" in text
        assert "  label: int64, 2 classes\n    0  cat\n    1  dog\n  path: str" in text
        facts = tiercache("info", data_set, "--json").events[0]
        assert facts["columns"][1] == {"name": "label", "type": "int64", "classes": ["cat", "dog"]}
        assert facts["url"] == str(data_set)


class TestHead:
    def test_info_and_head_show_data_of_another_library_in_place(self, tiercache, tmp_path):
        for year in (1, 2):
            folder = tmp_path / f"rows/year={year}"
            folder.mkdir(parents=True)
            pq.write_table(pa.table({"a": range(5), "t": [[1, 2]] * 5}), folder / "x.parquet")
        facts = tiercache("info", tmp_path / "rows", "--json").events[0]
        assert (facts["kind"], facts["version"], facts["records"], facts["shards"]) == ("Parquet", 0, 10, 2)
        assert [column["name"] for column in facts["columns"]] == ["a", "t", "year"]
        listed = tiercache("info", tmp_path / "rows", "--shards", "--json").events
        assert [event["name"] for event in listed[:-1]] == ["year=1/x.parquet", "year=2/x.parquet"]
        shown = tiercache("head", tmp_path / "rows/*/x.parquet", "--start", "4", "-n", "2", "--columns", "year,t")
        assert [line.split()[-1] for line in shown.out.splitlines() if " year" in line] == ["1", "2"]

    def test_head_shows_records_across_shards(self, tiercache, data_set):
        lines = tiercache("head", data_set, "-n", "15", "--start", "3").out.splitlines()
        assert lines[:4] == ["record 3", "  image  <image 1.1 KiB>", "  label  0 (cat)", '  path   "cat/3.png"']
        assert [line for line in lines if line.startswith("record")] == [f"record {i}" for i in range(3, 18)]
        assert lines[-1] == "15 of 20 records"


class TestExport:
    @pytest.fixture
    def mixed(self, tmp_path, tiercache):
        """A column of each kind that Parquet must learn about."""
        rows = [
            {"t": list(range(i % 3)), "f": [i, 1.5], "s": f"s{i}", "n": None if i % 2 else i, "j": {"k": i}}
            for i in range(30)
        ]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flags = ["--column", "f=float32[2]", "--shard-size", "400", "--block-size", "200"]
        tiercache("pack", tmp_path / "a.jsonl", tmp_path / "mixed", *flags)
        return tmp_path / "mixed", rows

    def test_an_exported_file_has_plain_types_that_pack_reads_back(self, tiercache, mixed, tmp_path):
        url, rows = mixed
        done = tiercache("export", url, tmp_path / "out.parquet")
        assert done.out.startswith(f"exported 30 records to {tmp_path}/out.parquet as parquet, 1 file, ")
        table = pq.read_table(tmp_path / "out.parquet")
        assert table["s"].to_pylist() == [row["s"] for row in rows]
        assert table["n"].to_pylist() == [row["n"] for row in rows]
        assert [v.tolist() for v in table["f"].combine_chunks().to_numpy_ndarray()] == [
            [float(x) for x in r["f"]] for r in rows
        ]
        tiercache("pack", tmp_path / "out.parquet", tmp_path / "again")
        before, after = (tiercache("head", u, "-n", "30", "--json").events[:-1] for u in (url, tmp_path / "again"))
        assert before == after
        columns = [tiercache("info", u, "--json").events[0]["columns"] for u in (url, tmp_path / "again")]
        assert columns[0] == columns[1]

    def test_a_file_of_another_format_is_refused(self, tiercache, data_set, tmp_path):
        done = tiercache("export", data_set, tmp_path / "out.csv", code=2)
        assert f"{tmp_path / 'out.csv'}: export writes no .csv file: name a file that ends in .parquet" in done.err
        assert not (tmp_path / "out.csv").exists()
        done = tiercache("export", data_set, tmp_path / "out.jsonl", code=1)
        assert "JSON has no image; parquet and arrow have all types" in done.err

    def test_images_with_classes_become_tars_that_pack_reads_back(self, tiercache, data_set, tmp_path):
        done = tiercache("export", data_set, tmp_path / "tars", "--format", "webdataset", "--json").events[-1]
        assert (done["format"], done["records"]) == ("webdataset", 20)
        types = [f"--column={pair}" for pair in ("image=image", "label=int", "path=str")]
        tiercache("pack", tmp_path / "tars", tmp_path / "again", *types)
        before, after = (
            {event["index"]: event["record"] for event in tiercache("head", url, "-n", "20", "--json").events[:-1]}
            for url in (data_set, tmp_path / "again")
        )
        assert {i: {name: record[name] for name in before[i]} for i, record in after.items()} == before

    def test_images_and_class_names_survive_export_and_pack(self, tiercache, data_set, photos, tmp_path):
        tiercache("export", data_set, tmp_path / "out.parquet")
        table = pq.read_table(tmp_path / "out.parquet", columns=["image"])
        storage = table["image"].combine_chunks()
        storage = storage.storage if isinstance(storage, pa.ExtensionArray) else storage
        assert storage[0].as_py() == (photos / "cat" / "0.png").read_bytes()
        tiercache("pack", tmp_path / "out.parquet", tmp_path / "again")
        assert tiercache("info", tmp_path / "again", "--json").events[0]["columns"][:2] == [
            {"name": "image", "type": "image"},
            {"name": "label", "type": "int64", "classes": ["cat", "dog"]},
        ]

    def test_existing_files_are_replaced_only_with_overwrite(self, tiercache, data_set, tmp_path):
        tiercache("export", data_set, tmp_path / "out.parquet")
        tiercache("export", data_set, tmp_path / "parts")
        for target in ("out.parquet", "parts"):
            assert "already" in tiercache("export", data_set, tmp_path / target, code=1).err
            tiercache("export", data_set, tmp_path / target, "--overwrite")

    def test_files_of_a_longer_earlier_export_are_removed(self, tiercache, data_set, tmp_path):
        tiercache("export", data_set, tmp_path / "parts")
        n_before = len(list((tmp_path / "parts").iterdir()))
        tiercache("pack", tmp_path / "parts" / "part-00000.parquet", tmp_path / "one")
        done = tiercache("export", tmp_path / "one", tmp_path / "parts", code=1)
        assert "another export" in done.err
        assert len(list((tmp_path / "parts").iterdir())) == n_before > 1
        tiercache("export", tmp_path / "one", tmp_path / "parts", "--overwrite")
        assert [p.name for p in (tmp_path / "parts").iterdir()] == ["part-00000.parquet"]

    def test_a_dry_run_writes_nothing(self, tiercache, data_set, tmp_path):
        done = tiercache("export", data_set, tmp_path / "out.parquet", "--dry-run", "--columns", "label")
        assert done.out.splitlines()[0] == "label: int64"
        assert "would export 20 records" in done.out
        assert not (tmp_path / "out.parquet").exists()
