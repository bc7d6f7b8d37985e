"""Packed sequences as data sets: every token once, on any ranks, from any state; mixtures, views, errors."""

from __future__ import annotations

import itertools
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from tests.support.http_server import HttpFaultServer
from tests.support.plain_packer import Plain
from tests.support.records import join_loading
from torch.utils.data import DataLoader as TorchLoader

import tiercache as tc
from tiercache.data.opened_version import OpenedVersion
from tiercache.data.packing import SequenceOptions

LENGTH = 8  # a unit is then 512 positions
MODES = ("concatenate", "best_fit", "separate")
OUTPUTS = ["tokens", "labels", "position_ids", "document_ids", "cu_seqlens"]
PAD, END = 999_999, 888_888


def write(path: Path, lengths, first: int = 0, dtype: str = "uint32", **options) -> list[list[int]]:
    """Write documents whose tokens count up from `first`; return them."""
    bounds = np.append(0, np.cumsum(lengths)) + first
    documents = [list(range(a, b)) for a, b in itertools.pairwise(bounds.tolist())]
    schema = {"tokens": tc.Ragged(dtype, (None,)), "number": "int64", "text": "str"}
    with tc.Writer(path, schema=schema, **{"shard_size": "12KiB", "block_size": "512B", **options}) as writer:
        columns = {"tokens": [np.array(d, dtype) for d in documents], "number": np.arange(len(documents))}
        writer.write_batch({**columns, "text": ["words " * (i % 3) for i in range(len(documents))]})
    return documents


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """{name: (path, documents)} of two data sets."""
    folder, random = tmp_path_factory.mktemp("documents"), np.random.default_rng(0)
    lengths = {"a": random.integers(0, 25, 900), "b": random.integers(1, 9, 400)}
    firsts = {"a": 0, "b": 100_000}
    return {name: (folder / name, write(folder / name, lengths[name], firsts[name])) for name in lengths}


@pytest.fixture
def opened(documents):
    """Data sets by name, and their documents."""
    found = {name: tc.Dataset(path) for name, (path, _) in documents.items()}
    yield found, {name: texts for name, (_, texts) in documents.items()}
    join_loading()
    for dataset in found.values():
        dataset.close()


def packed(dataset, length=LENGTH, **options):
    return tc.pack_sequences(dataset, "tokens", length, **{"pad": PAD, **options})


def batches(dataset, *, batch_size=5, **options):
    return list(tc.DataLoader(dataset, batch_size=batch_size, **options))


def joined(found, name="tokens"):
    return torch.cat([batch[name] for batch in found]).tolist()


def pieces(found) -> list[tuple[int, ...]]:
    """The tokens of each piece of a document in some batches."""
    every = []
    for batch in found:
        for tokens, ids in zip(batch["tokens"].tolist(), batch["document_ids"].tolist(), strict=True):
            row = zip(ids, tokens, strict=True)
            every += [tuple(t for _, t in run) for i, run in itertools.groupby(row, lambda pair: pair[0]) if i >= 0]
    return every


def tokens_of(found) -> list[int]:
    return sorted(itertools.chain(*pieces(found)))


def units_of(dataset, rows) -> list[list[int]]:
    """The numbers of the documents of each unit, in stored order."""
    source, leaf = dataset._source, rows._source.leaves[0]
    found, first = [], 0
    for shard in range(len(source.shard_records)):
        (table,) = source.block_sizes([shard])
        bounds = np.append(0, np.cumsum(table.records)) + first
        units = slice(*leaf.index.first_unit[shard : shard + 2].tolist())
        at = np.append(0, np.cumsum(leaf.index.n_blocks[units]))
        found += [range(bounds[a], bounds[b]) for a, b in itertools.pairwise(at.tolist())]
        first = int(bounds[-1])
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("end", "mask_borders"), [(None, False), (END, True)])
def test_stored_order_equals_a_plain_packer_in_every_way_of_reading(opened, mode, end, mask_borders):
    (datasets, documents), plain = opened, Plain(LENGTH, mode, end, PAD, mask_borders)
    rows = packed(datasets["a"], mode=mode, eos=end, mask_borders=mask_borders)
    units = units_of(datasets["a"], rows)
    expected = [row for unit in units for row in plain.rows([documents["a"][i] for i in unit])]
    assert len(units) > 20
    assert len(rows) == len(expected)
    found = batches(rows)
    assert [list(batch) for batch in found[:1]] == [[*OUTPUTS, "max_seqlen"]]
    for name in OUTPUTS[:-1]:
        assert joined(found, name) == [getattr(row, name) for row in expected], name
    some = [0, len(rows) - 1, 17, -3, 17]
    by_index, records = rows[some], [rows[i] for i in some]
    native, torchs = (
        next(iter(tc.DataLoader(rows.select(some), batch_size=5))),
        next(iter(TorchLoader(rows, batch_sampler=[[i % len(rows) for i in some]], collate_fn=tc.collate))),
    )
    for at, i in enumerate(some):
        for name, value in expected[i].as_record("tokens").items():
            assert records[at][name].tolist() == value.tolist()
            if name != "cu_seqlens":
                assert (
                    by_index[name][at].tolist()
                    == native[name][at].tolist()
                    == torchs[name][at].tolist()
                    == value.tolist()
                )
    used = sum(token != PAD for row in expected for token in row.tokens)
    assert rows._source.fill_ratio == used / (len(expected) * LENGTH)
    bounds = [0, *(at * LENGTH + bound for at, i in enumerate(some) for bound in expected[i].bounds[1:])]
    assert by_index["cu_seqlens"].tolist() == bounds
    assert by_index["max_seqlen"] == max(b - a for a, b in itertools.pairwise(bounds))
    for name in ("cu_seqlens", "max_seqlen"):
        assert np.array_equal(by_index[name], native[name])
        assert np.array_equal(by_index[name], torchs[name])
    with pytest.raises(ValueError, match="packed rows have no Arrow form"):
        next(rows.to_arrow())


def serve(dataset, plan: list[tuple[int, int]]) -> tuple[list[list[int]], list[int]]:
    """Serve one epoch in turns of (ranks, batches): each turn resumes the state of the one before, the last ends it.

    Returns the rows of all ranks, and how many of them are padding.
    """
    state, rows, padded = None, [], 0
    for turn, (world_size, n_batches) in enumerate([*plan, (plan[-1][0], None)]):
        states = []
        for rank in range(world_size):
            own = tc.LoaderOptions(seed=11, rank=rank, world_size=world_size, shuffle_streams=3)
            loader = tc.DataLoader(dataset, batch_size=3, shuffle=True, options=own)
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
            iterator = iter(loader)
            for batch in itertools.islice(iterator, n_batches):
                rows += batch["tokens"].tolist()
            states.append(loader.state_dict())
            iterator.close()
            padded += loader.stats()["padded"]
        assert all(other == states[0] for other in states), turn
        state = states[0]
        if state["epoch"]:  # the epoch ended within this turn
            break
    return rows, padded


@pytest.mark.parametrize(
    ("plan", "mode", "is_mixed"),
    [
        ([(1, 40), (4, 30), (3, 7)], "concatenate", False),
        ([(2, 0), (5, 41), (1, 3)], "best_fit", True),
        ([(3, 19)], "separate", True),
    ],
)
def test_a_run_that_is_killed_and_resumed_on_other_ranks_serves_every_row_once(opened, plan, mode, is_mixed):
    """A run that is resumed in turns of (ranks, batches) serves the rows of an uninterrupted run, and padding."""
    parts = [packed(dataset, mode=mode, eos=END) for dataset in opened[0].values()]
    rows = tc.mix(parts, [3, 1]) if is_mixed else parts[0]
    whole, _ = serve(rows, [(1, 10**6)])
    found, padded = serve(rows, plan)
    assert Counter(map(tuple, whole)) - Counter(map(tuple, found)) == Counter()
    assert sum((Counter(map(tuple, found)) - Counter(map(tuple, whole))).values()) == padded
    assert len(whole) == len(rows)


def test_a_mixture_has_its_shares_in_rows_in_every_range_and_its_parts_go_on_in_the_next_epoch(opened):
    datasets, documents = opened
    a, b = packed(datasets["a"]), packed(datasets["b"], mode="best_fit")
    mixed = tc.mix([a, b], [1, 2])
    loader = tc.DataLoader(mixed, batch_size=30, shuffle=True, options=tc.LoaderOptions(seed=5))
    epochs = [list(loader) for _ in range(3)]
    for batch in itertools.chain(*epochs):
        assert abs(int((batch["tokens"][:, 0] >= 100_000).sum()) - len(batch["tokens"]) * 2 / 3) < 5
    of_a = [row for batch in itertools.chain(*epochs) for row in batch["tokens"].tolist() if row[0] < 100_000]
    assert len({tuple(row) for row in of_a}) == len(of_a) < len(a), "no row of the larger part came twice"
    ratio = loader.stats()["fill_ratio"]
    n_b = len(mixed) * 2 // 3
    of_parts = [list(itertools.chain(*documents[name])) for name in "ab"]
    fills = [len(tokens) / (len(rows) * LENGTH) for tokens, rows in zip(of_parts, (a, b), strict=True)]
    assert ratio == pytest.approx(np.average(fills, weights=[len(mixed) - n_b, n_b]), rel=1e-3)


def test_views_are_packed_and_packed_rows_have_views(opened):
    datasets, documents = opened
    a = datasets["a"]
    odd = a.select(np.arange(1, 900, 2))
    late = a.filter(pc.field("number") >= 871)
    some = a.select([700, 3, 3, 650, 10])
    for view, expected in (
        (a.take(333), documents["a"][:333]),
        (a.skip(890), documents["a"][890:]),
        (late, documents["a"][871:]),
        (odd, documents["a"][1::2]),
        (odd.shard(3, 1), documents["a"][1::2][150:300]),
        (some, [documents["a"][i] for i in (3, 3, 10, 650, 700)]),
        (a.take(0), []),
    ):
        for mode in MODES:
            rows = packed(view, mode=mode)
            assert tokens_of(batches(rows, shuffle=True)) == sorted(itertools.chain(*expected)), mode
            if mode == "concatenate":
                assert list(itertools.chain(*pieces(batches(rows)))) == list(itertools.chain(*expected))
    rows = packed(a)
    every = joined(batches(rows))
    assert joined(batches(rows.take(30).skip(5))) == every[5:30]
    assert joined(batches(rows.select([9, 2, 9]))) == [every[i] for i in (9, 2, 9)]
    assert joined(batches(rows, sampler=[7, 1])) == [every[7], every[1]]
    assert list(batches(rows.select_columns(["labels", "tokens"]))[0]) == ["labels", "tokens"]
    labels, tokens = batches(rows.as_tuple("labels", "tokens"))[0]
    assert (labels.tolist(), tokens.tolist()) == (joined(batches(rows)[:1], "labels"), every[:5])


def test_joined_data_sets_are_packed_one_by_one(opened, tmp_path):
    datasets, documents = opened
    rows = packed(datasets["a"].take(100) + datasets["b"] + datasets["a"].skip(800))
    expected = [*documents["a"][:100], *documents["b"], *documents["a"][800:]]
    assert list(itertools.chain(*pieces(batches(rows)))) == list(itertools.chain(*expected))
    assert len(rows) == sum(
        len(packed(one)) for one in (datasets["a"].take(100), datasets["b"], datasets["a"].skip(800))
    )
    more = write(tmp_path / "more", [5, 0, 9, 30, 2], 200_000, "int64")  # parts may be stored with different dtypes
    both = tc.concat([packed(datasets["a"]), packed(tc.Dataset(tmp_path / "more"), mode="separate")])
    assert tokens_of(batches(both, shuffle=True)) == sorted(itertools.chain(*documents["a"], *more))


def test_packing_reads_no_documents_by_concatenation_no_lengths_and_of_a_pickle_nothing(opened, monkeypatch):
    datasets, _ = opened

    def refuse(*_args):
        raise AssertionError("documents were read")

    with monkeypatch.context() as patch:
        patch.setattr(OpenedVersion, "load_blocks", refuse)
        rows = packed(datasets["a"], mode="best_fit", eos=END)
        assert len(rows) > 1000, "lengths are not documents"
        patch.setattr(OpenedVersion, "load_shapes", refuse)
        assert len(packed(datasets["a"], eos=END)) > 1000
        with pytest.raises(AssertionError, match="documents were read"):
            packed(datasets["a"], mode="best_fit")
    expected, data = joined(batches(rows)), pickle.dumps(rows)
    assert len(data) < 4000
    monkeypatch.setattr("tiercache.data.packing._make_index", None)
    again = pickle.loads(data)
    assert (len(again), joined(batches(again))) == (len(rows), expected)
    join_loading()
    again.close()


def test_a_state_is_refused_by_rows_that_are_packed_otherwise(opened):
    datasets, _ = opened
    loader = tc.DataLoader(packed(datasets["a"]), batch_size=4, shuffle=True)
    state = loader.state_dict()
    for other in (
        packed(datasets["a"], 16),
        packed(datasets["a"], mode="separate"),
        packed(datasets["a"], eos=END),
        packed(datasets["a"].take(800)),
    ):
        with pytest.raises(tc.ObjectChanged, match="packed in another way"):
            tc.DataLoader(other, batch_size=4, shuffle=True).load_state_dict(state)
    with pytest.raises(tc.ObjectChanged):
        tc.DataLoader(datasets["a"], batch_size=4, shuffle=True).load_state_dict(state)


def test_a_state_of_an_older_version_continues_on_that_version_from_every_step(tmp_path):
    first = write(tmp_path / "data", [5, 9, 2, 7])
    rows = packed(tc.Dataset(tmp_path / "data"))
    loader = tc.DataLoader(rows, batch_size=1, shuffle=True, options=tc.LoaderOptions(seed=0))
    served, states = [], []
    for batch in loader:
        served.append(batch)
        states.append(loader.state_dict())
    schema = tc.Dataset(tmp_path / "data").schema
    with tc.Writer(tmp_path / "data", schema=schema, mode="append") as writer:
        writer.write({"tokens": np.arange(900, 930, dtype="uint32"), "number": 4, "text": ""})
    newer = packed(tc.Dataset(tmp_path / "data"))
    assert len(newer) > len(rows)
    for step, state in enumerate(states[:-1]):
        resumed = tc.DataLoader(newer, batch_size=1, shuffle=True)
        resumed.load_state_dict(state)
        for again, batch in zip(resumed, served[step + 1 :], strict=True):
            assert all(torch.equal(again[name], batch[name]) for name in OUTPUTS)
    assert tokens_of(batches(newer)) == [*itertools.chain(*first), *range(900, 930)]
    join_loading()


def test_wrong_arguments_are_explained(opened, tmp_path):
    datasets, _ = opened
    a = datasets["a"]
    with tc.Writer(tmp_path / "fixed", schema={"tokens": tc.Tensor("int64", (LENGTH,))}) as writer:
        writer.write({"tokens": np.arange(LENGTH)})
    with tc.Writer(tmp_path / "named", schema={"labels": tc.Ragged("int32", (None,))}) as writer:
        writer.write({"labels": np.arange(3, dtype="int32")})
    fixed, named = tc.Dataset(tmp_path / "fixed"), tc.Dataset(tmp_path / "named")
    transformed = tc.Dataset(a._source.url.removeprefix("file://"), transform=len)
    previous = tc.LoaderOptions(on_corrupt="previous")
    best = {"mode": "best_fit", "eos": END, "long_documents": "error"}
    for error, message, call in (
        (ValueError, "length must be 2 to", lambda: packed(a, 1)),
        (ValueError, "mode must be", lambda: packed(a, mode="greedy")),
        (ValueError, "long_documents must be", lambda: packed(a, mode="separate", long_documents="drop")),
        (ValueError, "cuts documents where rows end", lambda: packed(a, long_documents="error")),
        (TypeError, "eos must be a token", lambda: packed(a, eos="</s>")),
        (ValueError, "eos=4294967296 is no token of .*'tokens', .* 0 to 4294967295", lambda: packed(a, eos=2**32)),
        (ValueError, "eos=-1 is no token", lambda: packed(a, eos=-1)),
        (ValueError, "pad must fit int64", lambda: packed(a, pad=2**63)),
        (tc.SchemaError, "packs a column of token lists", lambda: tc.pack_sequences(a, "number", 8)),
        (tc.SchemaError, "no such column", lambda: tc.pack_sequences(a, "words", 8)),
        (tc.SchemaError, "another entry of this name", lambda: tc.pack_sequences(named, "labels", 8)),
        (TypeError, "takes a tiercache.Dataset", lambda: tc.pack_sequences([[1, 2]], "tokens", 8)),
        (ValueError, "packed already", lambda: packed(packed(a))),
        (ValueError, "has a transform", lambda: packed(transformed)),
        (ValueError, "pack the data sets, then mix", lambda: packed(tc.mix([a, datasets["b"]], [1, 1]))),
        (ValueError, "select from each data set", lambda: packed((a + datasets["b"]).take(950))),
        (ValueError, "filter the documents", lambda: packed(a).filter(pc.field("labels") == 3)),
        (tc.SchemaError, "only with packed rows", lambda: tc.concat([packed(a).select_columns(["tokens"]), fixed])),
        (tc.SchemaError, r"1 plain records.*pack_sequences\(\)", lambda: tc.mix([packed(a), a], [1, 1])),
        (tc.SchemaError, r"data set 0 has plain records, data set 1 packed rows", lambda: a + packed(a)),
        (tc.SchemaError, "shape|int64", lambda: tc.concat([packed(a), packed(a, 16)])),
        (ValueError, "packed rows of many documents", lambda: tc.DataLoader(packed(a), options=previous)),
        (ValueError, r"document \d+ has 24 tokens, and a row has 24 with the end token", lambda: packed(a, 24, **best)),
    ):
        with pytest.raises(error, match=message):
            call()
    assert len(packed(a, 25, **best)) > 100


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_nulls_and_empty_documents_are_empty(tmp_path, compression):
    schema = {"tokens": tc.Ragged("int32", (None,), nullable=True)}
    values = [None, [1, 2], [], None, [3], [4, 5, 6, 7, 8]]
    with tc.Writer(tmp_path / "data", schema=schema, compression=compression) as writer:
        for value in values:
            writer.write({"tokens": None if value is None else np.array(value, np.int32)})
    dataset = tc.Dataset(tmp_path / "data")
    assert joined(batches(packed(dataset, 4))) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert joined(batches(packed(dataset, 4, mode="separate"))) == [
        [1, 2, PAD, PAD],
        [3, PAD, PAD, PAD],
        [4, 5, 6, 7],
        [8, PAD, PAD, PAD],
    ]
    assert len(packed(dataset, 4, mode="separate", eos=0)) == 7
    join_loading()
    dataset.close()


def objects_of(folder: Path) -> dict[str, bytes]:
    files = [file for file in (folder / "data").rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize("is_cached", [True, False])
def test_only_lengths_are_fetched_to_pack_a_remote_data_set(tmp_path, is_cached):
    documents = write(tmp_path / "data", [5000] * 120, shard_size="4MiB", block_size="1MiB", compression="none")
    objects = objects_of(tmp_path)
    with HttpFaultServer(objects) as server, tc.Cache(tmp_path / "cache", size="64MiB") as cache:
        dataset = tc.Dataset(f"{server.url}/data", cache=cache if is_cached else False)
        before = dataset._source.storage.figures()["bytes_fetched"]
        rows = packed(dataset, 4096, mode="separate")
        assert len(rows) == 2 * 120
        assert dataset._source.storage.figures()["bytes_fetched"] - before < 0.2 * sum(map(len, objects.values()))
        assert tokens_of(batches(rows)) == list(itertools.chain(*documents))
        join_loading()
        rows.close()
        dataset.close()


def test_a_file_that_is_damaged_or_truncated_while_rows_are_served_is_an_error(tmp_path):
    write(tmp_path / "data", [1000] * 400, shard_size="64MiB", block_size="64KiB", compression="none")
    shard = max((p for p in (tmp_path / "data").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    shard.chmod(0o600)
    dataset = tc.Dataset(tmp_path / "data")
    rows = packed(dataset, 500)
    iterator = iter(tc.DataLoader(rows, batch_size=4, options=tc.LoaderOptions(memory_bytes="64KiB", threads=1)))
    next(iterator)
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 3)
        file.write(b"wrong")
    damaged = packed(tc.Dataset(tmp_path / "data"), 500)
    for read in (lambda: batches(damaged, shuffle=True), lambda: damaged[list(range(len(damaged)))]):
        with pytest.raises(tc.CorruptShard, match="CRC-32C"):
            read()
    os.truncate(shard, 1 << 16)
    with pytest.raises(tc.CorruptShard, match=r"cannot be read|is shorter than"):
        list(iterator)
    with pytest.raises(tc.CorruptShard):
        rows[700]
    join_loading()
    dataset.close()


def write_masked(path: Path, lengths, dtype: str, n_masks=None) -> dict[int, bool]:
    """Write documents of numbered tokens with a mask; return which tokens are labels."""
    random, n_masks = np.random.default_rng(5), dict(enumerate(lengths)) | (n_masks or {})
    documents = [list(range(a, b)) for a, b in itertools.pairwise(np.append(0, np.cumsum(lengths)).tolist())]
    masks = [random.integers(0, 2, n_masks[i]).astype(dtype) for i in range(len(lengths))]
    schema = {"tokens": tc.Ragged("int32", (None,)), "text": "str", "mask": tc.Ragged(dtype, (None,))}
    with tc.Writer(path, schema=schema, shard_size="12KiB", block_size="512B") as writer:
        for document, mask in zip(documents, masks, strict=True):
            writer.write({"tokens": np.array(document, "int32"), "text": "words", "mask": mask})
    pairs = zip(documents, masks, strict=True)
    return {t: bool(m) for document, mask in pairs for t, m in zip(document, mask, strict=False)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["bool", "int32"])
def test_labels_whose_own_token_has_the_mask_0_are_ignored_in_every_way_of_reading(tmp_path, mode, dtype):
    is_label = write_masked(tmp_path / "data", np.random.default_rng(1).integers(0, 25, 600), dtype)
    dataset = tc.Dataset(tmp_path / "data").select(np.flatnonzero(np.arange(600) % 5))  # a view, which cuts blocks
    plain, rows = packed(dataset, mode=mode), packed(dataset, mode=mode, loss_mask="mask")
    assert list(rows[0]) == OUTPUTS
    for name in OUTPUTS[:-1]:
        found, unmasked = joined(batches(rows), name), joined(batches(plain), name)
        if name == "labels":
            unmasked = [[i if is_label.get(i) else -100 for i in row] for row in unmasked]
            assert found == [rows[i]["labels"].tolist() for i in range(len(rows))]
        assert found == unmasked
    assert len({i for row in joined(batches(rows), "labels") for i in row}) > 1000
    again = pickle.loads(pickle.dumps(rows))
    assert joined(batches(again), "labels") == joined(batches(rows), "labels")
    first, second = (tc.DataLoader(one, batch_size=5, shuffle=True) for one in (plain, rows))
    next(iter(first))
    with pytest.raises(tc.ObjectChanged, match="packed in another way"):
        second.load_state_dict(first.state_dict())
    for one in (rows, again, dataset):
        one.close()


def test_a_mask_of_another_length_than_the_tokens_is_an_error_that_names_the_record(tmp_path):
    write_masked(tmp_path / "data", [4] * 300, "uint8", {217: 3})
    dataset = tc.Dataset(tmp_path / "data")
    message = (
        r"column 'mask': record 217 of '.*data', version 1 has 4 tokens in 'tokens' and a loss mask of 3 in 'mask'"
    )
    with pytest.raises(tc.SchemaError, match=message):
        batches(packed(dataset, loss_mask="mask"))
    with pytest.raises(tc.SchemaError, match=message):
        packed(dataset.skip(100), loss_mask="mask")[:]
    good = packed(dataset.select([i for i in range(300) if i != 217]), loss_mask="mask")
    assert len(joined(batches(good))) == len(good)
    with pytest.raises(tc.SchemaError, match="loss_mask names a column with a mask for each token, and this is str"):
        packed(dataset, loss_mask="text")
    with pytest.raises(tc.SchemaError, match="masks"):
        packed(dataset, loss_mask="masks")
    with pytest.raises(ValueError, match="loss_mask='tokens' is the column of the tokens"):
        packed(dataset, loss_mask="tokens")
    dataset.close()


def test_rows_without_a_loss_mask_have_the_digest_that_states_know():
    options = SequenceOptions("tokens", 8, "concatenate", "cut", None, 0, False)
    assert options.digest == "b27d8f7b017997ff71a68a6954795444"
