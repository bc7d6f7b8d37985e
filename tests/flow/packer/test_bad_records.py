"""Bad records: they end a packing, or are left out and reported."""

import base64
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.flow.packer.test_folders import photo, write
from tests.flow.packer.test_packing import is_empty, read
from tests.support.image_files import png
from typer.testing import CliRunner

from tiercache.cli.app import app
from tiercache.errors import SchemaError
from tiercache.packer.pack import pack


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("workers", [1, 2])
def test_two_thousand_images_with_forty_bad_ones_are_packed_in_one_run_with_a_report_of_the_forty(tmp_path, workers):
    rng = np.random.default_rng(0)
    whole = photo()
    damaged = [b"", b"<html>not found</html>", whole[: len(whole) // 2], png(b"x" * 100)[:-12], rng.bytes(500)]
    bad = set(rng.choice(2000, 40, replace=False).tolist())
    names = [f"{'cat' if i % 2 else 'dog'}/{i:04d}.jpg" for i in range(2000)]
    folder = write(tmp_path / "in", {n: damaged[i % 5] if i in bad else png(b"%d" % i) for i, n in enumerate(names)})
    with pytest.raises(SchemaError, match=r"\.jpg: "):
        pack(folder, tmp_path / "out")
    with pytest.warns(UserWarning, match="40 bad records were not packed"):
        version = pack(folder, tmp_path / "out", on_error="skip", shard_size="20KB", workers=workers)
    assert version.n_records == 1960
    assert {r["path"] for r in read(tmp_path / "out")} == {name for i, name in enumerate(names) if i not in bad}
    report = lines(tmp_path / "out.bad.jsonl")
    assert [line["location"] for line in report] == [str(folder / n) for n in sorted(names[i] for i in bad)]
    assert all(line["reason"] for line in report)


def test_a_dead_letter_has_the_record_itself(tmp_path):
    folder = write(tmp_path / "in", {"1.png": png(), "2.png": b"\xff\xd8 broken"})
    with pytest.warns(UserWarning, match="1 bad records"):
        pack(folder, tmp_path / "out", on_error="dead-letter", report=tmp_path / "report.jsonl")
    (line,) = lines(tmp_path / "report.jsonl")
    assert base64.b64decode(line["content"]["base64"]) == b"\xff\xd8 broken"
    rows = ['{"x": 1}', "not JSON", '{"x": "text"}', '{"x": 5}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.warns(UserWarning, match="2 bad records"):
        pack(tmp_path / "rows.jsonl", tmp_path / "rows", on_error="dead-letter", schema={"x": "int8"})
    assert [r["x"] for r in read(tmp_path / "rows")] == [1, 5]
    found = {line["location"].rpartition(" ")[2]: line["content"] for line in lines(tmp_path / "rows.bad.jsonl")}
    assert found == {"2": "not JSON\n", "3": {"x": "text"}}


def test_values_that_do_not_fit_and_files_that_cannot_be_opened_are_left_out(tmp_path):
    (tmp_path / "in").mkdir()
    values = [i if i % 3 else 1000 for i in range(300)]
    pq.write_table(pa.table({"x": pa.array(values, pa.int32())}), tmp_path / "in" / "a.parquet", row_group_size=100)
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1 cut off")
    done = CliRunner().invoke(
        app,
        ["pack", str(tmp_path / "in"), str(tmp_path / "out"), "--column", "x=int16", "--on-error", "skip", "--json"],
    )
    assert done.exit_code == 0, done.output
    assert len(read(tmp_path / "out")) == 300
    with pytest.warns(UserWarning, match="216 bad records"):
        pack(tmp_path / "in", tmp_path / "small", schema={"x": "int8"}, on_error="skip")
    assert [r["x"] for r in read(tmp_path / "small")] == [value for value in values if value < 128]
    assert "b.parquet" in lines(tmp_path / "small.bad.jsonl")[-1]["location"]


def test_without_bad_records_the_report_is_empty_and_an_unknown_policy_is_an_error(tmp_path):
    folder = write(tmp_path / "in", {"1.png": png()})
    pack(folder, tmp_path / "out", on_error="skip")
    assert (tmp_path / "out.bad.jsonl").read_bytes() == b""
    with pytest.raises(ValueError, match="on_error must be one of stop, skip, dead-letter"):
        pack(folder, tmp_path / "other", on_error="ignore")
    assert is_empty(tmp_path / "other")


@pytest.mark.parametrize("order", [{}, {"shuffle": 1}, {"dedup": True, "sort": "x"}])
def test_if_all_records_are_bad_nothing_is_committed_and_no_pass_is_left(tmp_path, order, monkeypatch):
    monkeypatch.setattr("tiercache.packer.rearrange.RUN_BYTES", 50)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"x": f"text {i}"}) + "\n" for i in range(30)))
    with pytest.raises(SchemaError, match=r"no record could be packed, and 30 are bad.*out\.bad\.jsonl"):
        pack(tmp_path / "a.jsonl", tmp_path / "out", schema={"x": "int8"}, on_error="skip", **order)
    assert len(lines(tmp_path / "out.bad.jsonl")) == 30
    assert is_empty(tmp_path / "out")
    version = pack(tmp_path / "a.jsonl", tmp_path / "out", schema={"x": "str"}, on_error="skip", **order)
    assert (version.number, version.n_records) == (1, 30)
