"""Packings in another order, and without duplicates, compared with what the same source has in memory."""

import json
import math
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.flow.packer.test_packing import shards_of
from tests.support.image_files import png
from typer.testing import CliRunner

import tiercache as tc
from tiercache.cli.app import app
from tiercache.errors import SchemaError
from tiercache.packer import rearrange, tables
from tiercache.packer.plan import PackOptions, plan_pack
from tiercache.shard.verify import verify_dataset
from tiercache.store import open_store

N = 900
ROWS = [{"id": i, "key": (i * 7919) % 101, "text": f"text {i % 37} " * (i % 5)} for i in range(N)]
SMALL = {"shard_size": 6000, "block_size": 500, "compression": "none"}


@pytest.fixture
def few_bytes(monkeypatch):
    """Runs and buckets of a few records, so that there are many of them."""
    monkeypatch.setattr(rearrange, "RUN_BYTES", 2500)


def write_source(folder, rows=ROWS, n_files=7):
    folder.mkdir()
    for number, chunk in enumerate(np.array_split(np.arange(len(rows)), n_files)):
        lines = (json.dumps(rows[i]) + "\n" for i in chunk.tolist())
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "in")


def read(url):
    return list(tc.Dataset(url))


def ids(url):
    return [record["id"] for record in tc.Dataset(url)]


def nothing_left(url):
    return not [path for path in Path(url).glob("_tiercache/packing/**/*") if path.is_file()]


class TestOrder:
    @pytest.mark.parametrize(
        "options", [{"shuffle": 5}, {"sort": "key"}, {"sort": "text"}, {"dedup": "text", "sort": "key"}]
    )
    def test_any_number_of_workers_writes_the_same_shards_and_leaves_nothing_else(
        self, source, tmp_path, few_bytes, options
    ):
        for workers in (1, 3):
            tc.pack(source, tmp_path / f"{workers}", workers=workers, **options, **SMALL)
            assert nothing_left(tmp_path / f"{workers}")
            assert list(verify_dataset(open_store(tmp_path / f"{workers}"))) == []
        assert len(shards_of(tmp_path / "1")[0]) > (0 if "dedup" in options else 1)
        assert shards_of(tmp_path / "1") == shards_of(tmp_path / "3")
        assert all(record == ROWS[record["id"]] for record in read(tmp_path / "3"))

    def test_a_sorted_data_set_has_equal_values_in_the_order_of_the_source_and_nulls_last(self, tmp_path, few_bytes):
        rows = [{"id": i, "key": None if i % 13 == 0 else i % 3, "text": "x" * (i % 50)} for i in range(N)]
        write_source(tmp_path / "in", rows)
        tc.pack(tmp_path / "in", tmp_path / "out", sort="key", **SMALL)
        expected = sorted(range(N), key=lambda i: (rows[i]["key"] is None, rows[i]["key"] or 0))
        assert ids(tmp_path / "out") == expected

    def test_records_of_one_value_alone_do_not_fill_a_bucket(self, source, tmp_path, few_bytes, monkeypatch):
        found = []
        plan = rearrange.bucket_splits

        def seen(*arguments):
            found.extend(plan(*arguments))
            return tuple(found)

        monkeypatch.setattr("tiercache.packer.pack.bucket_splits", seen)
        rows = [{"id": i, "key": 0, "text": "x" * 20} for i in range(N)]
        tc.pack(write_source(tmp_path / "same", rows), tmp_path / "out", sort="key", **SMALL)
        assert ids(tmp_path / "out") == list(range(N))
        assert len(found) > 10
        # Each run adds at most a block, which is here as large as the run.
        assert max(split.n_bytes for split in found) <= 4 * rearrange.RUN_BYTES

    def test_a_shuffle_is_a_permutation_that_the_seed_decides(self, source, tmp_path, few_bytes):
        orders = []
        for seed in (1, 2):
            tc.pack(source, tmp_path / f"{seed}", shuffle=seed, **SMALL)
            orders.append(ids(tmp_path / f"{seed}"))
            assert sorted(orders[-1]) == list(range(N))
        assert orders[0] != orders[1]

    @pytest.mark.parametrize("run_bytes", [700, 1 << 20], ids=["runs", "memory"])
    def test_each_record_is_anywhere_with_the_same_probability(self, tmp_path, monkeypatch, run_bytes):
        monkeypatch.setattr(rearrange, "RUN_BYTES", run_bytes)
        n, n_seeds, n_bins = 60, 120, 6
        rows = pa.table({"id": range(n), "pad": ["x" * 20] * n})
        counts, follows = np.zeros((n_bins, n_bins)), 0
        for seed in range(n_seeds):
            tc.pack(rows, f"memory://shuffle-{run_bytes}-{seed}", shuffle=seed, shard_size=1000)
            order = np.array(ids(f"memory://shuffle-{run_bytes}-{seed}"))
            np.add.at(counts, (order * n_bins // n, np.arange(n) * n_bins // n), 1)
            follows += int(np.count_nonzero(np.diff(order) == 1))
        expected = n_seeds * n / n_bins**2
        # Chi-squared with 25 degrees of freedom: above 60 with a probability of 1 in 10,000, but the seeds are fixed.
        assert ((counts - expected) ** 2 / expected).sum() < 60
        # A record follows its neighbour of the source once in a shuffle, on average.
        assert abs(follows - n_seeds) < 5 * math.sqrt(n_seeds)

    def test_a_small_source_is_read_and_written_once(self, source, tmp_path, monkeypatch):
        read_, reads = tables.JsonLines.read, []

        def counted(self, split, batch_bytes):
            reads.append(split)
            return read_(self, split, batch_bytes)

        monkeypatch.setattr(tables.JsonLines, "read", counted)
        created = []
        create = type(open_store(tmp_path)).create
        monkeypatch.setattr(
            type(open_store(tmp_path)), "create", lambda *a, **k: created.append(a[1]) or create(*a, **k)
        )
        tc.pack(source, tmp_path / "out", sort="key", **SMALL)
        assert len(reads) == len(set(reads)) == 7
        assert ids(tmp_path / "out") == sorted(range(N), key=lambda i: ROWS[i]["key"])
        assert created
        assert not [key for key in created if "_tiercache" in key]

    def test_a_small_source_of_much_data_is_sorted_by_runs(self, tmp_path, monkeypatch):
        rows = [{"id": i, "key": -i % 50, "text": "a" * 1000} for i in range(500)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
        n_bytes = (tmp_path / "a.parquet").stat().st_size
        monkeypatch.setattr(rearrange, "RUN_BYTES", 50_000)
        assert n_bytes < 50_000
        for kind in ("shuffle", "sort"):
            tc.pack(tmp_path / "a.parquet", tmp_path / kind, **{kind: 1 if kind == "shuffle" else "key"}, **SMALL)
        assert ids(tmp_path / "sort") == sorted(range(500), key=lambda i: -i % 50)
        assert sorted(ids(tmp_path / "shuffle")) == list(range(500))

    @pytest.mark.parametrize("source", ["rows", "iterator", "function"])
    def test_objects_are_rearranged_too(self, tmp_path, few_bytes, source):
        given = {"rows": ROWS, "iterator": iter(ROWS), "function": rows_again}[source]
        tc.pack(given, tmp_path / "out", sort="key", map=with_length, **SMALL)
        found = read(tmp_path / "out")
        assert [record["id"] for record in found] == sorted(range(N), key=lambda i: ROWS[i]["key"])
        assert all(record["length"] == len(ROWS[record["id"]]["text"]) for record in found)


def rows_again():
    return iter(ROWS)


def with_length(record):
    return {**record, "length": len(record["text"])}


KINDS = {
    "int64?": st.none() | st.integers(-3, 3),
    "float64?": st.none() | st.sampled_from([-1.5, 0.0, 2.5, math.inf, -math.inf, math.nan]),
    "str?": st.none() | st.text("ab\0é", max_size=2),
    "bytes": st.binary(max_size=2),
    "bool": st.booleans(),
}


def rank(value):
    """Sort key: numbers and text, then NaN, then null."""
    is_nan = isinstance(value, float) and math.isnan(value)
    return (value is None, is_nan, 0 if value is None or is_nan else value)


def plain(value):
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


NUMBERS = count()


class TestOracle:
    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_every_combination_equals_what_the_source_has_in_memory(self, monkeypatch, data):
        kind = data.draw(st.sampled_from(list(KINDS)))
        keys = data.draw(st.lists(KINDS[kind], max_size=60))
        rows = [{"key": key, "x": [i % 3] * (i % 2), "id": i} for i, key in enumerate(keys)]
        for row in rows[1::3]:
            row["id"] = 0
        monkeypatch.setattr(rearrange, "RUN_BYTES", data.draw(st.sampled_from([60, 300, 5000])))
        dedup = data.draw(st.sampled_from([False, True, "key"]))
        order = data.draw(st.sampled_from([{}, {"sort": "key"}, {"shuffle": 3}]))
        split = data.draw(st.sampled_from([None, {"a": 0.6, "b": 0.4}]))
        url = f"memory://oracle-{next(NUMBERS)}"
        schema = {"key": kind, "x": "int32[*]", "id": "int64"}
        tc.pack(rows, url, schema=schema, dedup=dedup, split=split, split_by=split and "id", **order, **SMALL)
        seen, kept = set(), []
        for row in rows:
            content = repr(row["key"]) if dedup == "key" else repr(row)
            if not dedup or content not in seen:
                kept.append(row)
            seen.add(content)
        parts = [tc.Dataset(f"{url}/{part}" if part else url) for part in (split or [""])]
        found = [[{name: plain(value) for name, value in record.items()} for record in part] for part in parts]
        for part in found:
            mine = [row for row in kept if len(found) == 1 or row["id"] in {one["id"] for one in part}]
            expected = sorted(mine, key=lambda row: rank(row["key"])) if "sort" in order else mine
            if "shuffle" in order:
                assert Counter(map(repr, part)) == Counter(map(repr, expected))
            else:
                assert list(map(repr, part)) == list(map(repr, expected))
        assert sum(map(len, found)) == len(kept)


class TestDuplicates:
    def test_the_first_of_equal_records_is_kept_in_the_order_of_the_source(self, tmp_path, few_bytes):
        rows = [{**ROWS[i % 400], "extra": None if i % 2 else "y"} for i in range(N)]
        write_source(tmp_path / "in", rows)
        for workers in (1, 2):
            tc.pack(tmp_path / "in", tmp_path / f"{workers}", dedup=True, workers=workers, **SMALL)
        assert ids(tmp_path / "1") == list(range(400))
        assert shards_of(tmp_path / "1") == shards_of(tmp_path / "2")
        tc.pack(tmp_path / "in", tmp_path / "text", dedup="text", **SMALL)
        texts = list(dict.fromkeys(row["text"] for row in rows))
        assert [record["text"] for record in read(tmp_path / "text")] == texts

    def test_one_record_over_all_buckets_is_kept_once(self, tmp_path, few_bytes):
        rows = [{"id": 3, "key": 5, "text": "same"}] * 700 + ROWS[:50]
        write_source(tmp_path / "in", rows)
        tc.pack(tmp_path / "in", tmp_path / "out", dedup=True, **SMALL)
        assert ids(tmp_path / "out") == [3, *range(50)]

    def test_images_tensors_and_nested_values_are_compared_by_their_content(self, tmp_path):
        rows = [
            {"image": png(bytes([i % 3])), "x": np.full((2, 2), i % 2, np.float32), "z": [{"a": [i % 2], "b": None}]}
            for i in range(30)
        ]
        schema = {
            "image": "image",
            "x": "float32[2, 2]",
            "z": pa.list_(pa.struct([("a", pa.list_(pa.int8())), ("b", pa.string())])),
        }
        tc.pack(rows, tmp_path / "out", schema=schema, dedup=True)
        assert len(tc.Dataset(tmp_path / "out")) == 6
        for column, n in (("image", 3), ("x", 2), ("z", 2)):
            tc.pack(rows, tmp_path / column, schema=schema, dedup=column)
            assert len(tc.Dataset(tmp_path / column)) == n

    def test_a_bad_record_is_no_first_record_and_is_reported_once(self, tmp_path, few_bytes):
        rows = [{"id": i // 2, "text": "t"} for i in range(2200)]
        rows[1500] = {"id": rows[1500]["id"], "text": 5}
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for order in ({}, {"sort": "id"}, {"shuffle": 1}):
            name = next(iter(order), "none")
            with pytest.warns(UserWarning, match="1 bad records"):
                tc.pack(tmp_path / "a.jsonl", tmp_path / name, dedup="id", on_error="skip", **order, **SMALL)
            assert sorted(ids(tmp_path / name)) == list(range(1100))
            report = Path(f"{tmp_path / name}.bad.jsonl").read_text().splitlines()
            assert [json.loads(line)["location"].rpartition(" ")[2] for line in report] == ["1501"]

    def test_the_command_says_how_many_were_left_out(self, tmp_path):
        write_source(tmp_path / "in", ROWS + ROWS[:11])
        run = CliRunner().invoke
        for more, n in (("--dedup", 11), ("--dedup-by=text", None)):
            out = str(tmp_path / more)
            done = run(app, ["pack", str(tmp_path / "in"), out, more, "--sort", "key", "--json"])
            assert done.exit_code == 0, done.stderr
            events = [json.loads(line) for line in done.stdout.splitlines()]
            (said,) = [event["records"] for event in events if event["event"] == "duplicates"]
            assert said == n or (n is None and said == len(ROWS) + 11 - len({row["text"] for row in ROWS}))
        done = run(app, ["pack", str(tmp_path / "in"), str(tmp_path / "shuffled"), "--shuffle", "3"])
        assert done.exit_code == 0, done.stderr
        assert ids(tmp_path / "shuffled") != [row["id"] for row in ROWS + ROWS[:11]]

    def test_what_cannot_be_done_is_refused_before_anything_is_written(self, source, tmp_path):
        for options, error, text in (
            ({"shuffle": 1, "sort": "key"}, ValueError, "give one of them"),
            ({"shuffle": True}, TypeError, "shuffle must be a seed"),
            ({"sort": "nope"}, SchemaError, "nope"),
            ({"dedup": "nope"}, SchemaError, "nope"),
        ):
            with pytest.raises(error, match=text):
                tc.pack(source, tmp_path / "out", **options)
        with pytest.raises(SchemaError, match="takes a column of numbers, text, bytes or times"):
            tc.pack([{"x": np.zeros(3)}], tmp_path / "out", sort="x")
        with pytest.raises(ValueError, match="an iterator is read once"):
            tc.pack(iter(ROWS), tmp_path / "out", dedup=True)
        assert not (tmp_path / "out").exists()
        tc.pack(rows_again, tmp_path / "again", dedup=True)
        assert len(tc.Dataset(tmp_path / "again")) == N


class TestContinuing:
    @pytest.mark.parametrize("options", [{"shuffle": 5}, {"sort": "key", "dedup": True}], ids=["shuffle", "sort"])
    def test_after_an_interrupt_in_any_pass_the_same_call_continues(self, source, tmp_path, few_bytes, options):
        tc.pack(source, tmp_path / "whole", **options, **SMALL)

        def stop(progress):
            if progress.n_bytes >= progress.total_bytes * part:
                raise KeyboardInterrupt

        for part in (0.2, 0.45, 0.6, 0.8, 0.95):
            url = tmp_path / f"{part}"
            with pytest.raises(KeyboardInterrupt):
                tc.pack(source, url, on_progress=stop, **options, **SMALL)
            other = {"shuffle": 6} if "shuffle" in options else {"sort": "key"}
            assert plan_pack(source, url, PackOptions(**options, **SMALL)).is_begun
            assert not plan_pack(source, url, PackOptions(**other, **SMALL)).is_begun
            part = 2
            tc.pack(source, url, on_progress=stop, **options, **SMALL)
            assert shards_of(url) == shards_of(tmp_path / "whole")
            assert nothing_left(url)

    def test_a_filter_a_split_and_an_append_go_together(self, source, tmp_path, few_bytes):
        given = {"split": {"a": 0.5, "b": 0.5}, "split_by": "text", "filter": pc.field("id") >= 100, "sort": "key"}
        for mode in ("create", "append"):
            tc.pack(source, tmp_path / "out", mode=mode, dedup="id", workers=2, **given, **SMALL)
        parts = [read(tmp_path / "out" / part) for part in "ab"]
        assert not {r["text"] for r in parts[0]} & {r["text"] for r in parts[1]}
        for part in parts:
            half = part[: len(part) // 2]
            assert part == half * 2
            assert [r["key"] for r in half] == sorted(r["key"] for r in half)
        assert sum(map(len, parts)) == 2 * (N - 100)
