"""What every layout of another library must do, whose files `tc.Dataset` reads where they lie."""

import pickle
import random
import shutil
import threading
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.support.layout_cases import CASES
from tests.support.token_and_arrow_cases import CASES as TOKEN_AND_ARROW_CASES

import tiercache as tc
from tiercache.cache import Cache
from tiercache.data.opened_layout import OpenedLayout
from tiercache.errors import ObjectChanged, SchemaError, TierCacheError


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "default-cache"))


@pytest.fixture(params=[*CASES, *TOKEN_AND_ARROW_CASES], ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture
def written(case, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder, case.write(folder)


def same(found, expected) -> bool:
    if expected is None or found is None:
        return found is expected
    if isinstance(expected, np.ndarray):
        return found.shape == expected.shape and np.array_equal(found, expected) and found.dtype == expected.dtype
    return found == expected and not isinstance(found, np.ndarray)


def check(records, columns, numbers):
    records = list(records)
    assert len(records) == len(numbers)
    for record, number in zip(records, numbers, strict=True):
        assert record.keys() == columns.keys()
        for name, values in columns.items():
            assert same(record[name], values[number]), (name, number, record[name], values[number])


def opened(dataset) -> OpenedLayout:
    return dataset.__tiercache__().source.leaves[0]


def epoch(dataset, columns, *, ranks=1, rank=0, state=None, n_batches=None):
    """Return the first records of one rank of a shuffled epoch, as (values by column), and the loader's state."""
    options = tc.LoaderOptions(seed=3, rank=rank, world_size=ranks)
    loader = tc.DataLoader(dataset, batch_size=16, shuffle=True, options=options)
    if state is not None:
        loader.load_state_dict(state)
    found = []
    iterator = iter(loader)
    for batch in iterator:
        found += records_of(batch, columns)
        if n_batches is not None and len(found) >= 16 * n_batches:
            break
    return found, loader.state_dict()


def records_of(batch, columns):
    n = len(batch[next(iter(columns))])
    records = []
    for i in range(n):
        record = {}
        for name in columns:
            values = batch[name]
            value = values[i]
            valid = batch.get(f"{name}.valid")
            if valid is not None and not valid[i]:
                value = None
            record[name] = value
        records.append(record)
    return records


def key_of(record) -> bytes:
    return pickle.dumps({name: plain(value) for name, value in record.items()})


def plain(value):
    if hasattr(value, "numpy"):
        value = value.numpy()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


def keys_of_columns(columns):
    n = len(next(iter(columns.values())))
    return [key_of({name: values[i] for name, values in columns.items()}) for i in range(n)]


def test_the_types_of_its_columns_are_known_when_it_is_opened(case, written):
    folder, columns = written
    dataset = tc.Dataset(folder)
    assert {column.name: str(column) for column in dataset.schema.columns} == dict(case.types)
    assert len(dataset) == len(next(iter(columns.values())))
    assert opened(dataset).layout.name in repr(dataset)


def test_every_way_of_reading_gives_the_records_that_were_written(written):
    folder, columns = written
    dataset = tc.Dataset(folder)
    n = len(dataset)
    check(dataset, columns, range(n))
    some = random.Random(1).sample(range(n), min(n, 60))
    check((dataset[i] for i in some), columns, some)
    check(dataset.__getitems__(some), columns, some)
    batch = dataset[some]
    for name, values in columns.items():
        valid = batch.get(f"{name}.valid", np.ones(len(some), bool))
        for place, number in enumerate(some):
            if valid[place]:
                assert same(batch[name][place], values[number])
            else:
                assert values[number] is None
    tables = pa.Table.from_batches(dataset.to_arrow())
    assert tables.num_rows == n


def test_each_column_is_read_alone(written):
    folder, columns = written
    dataset = tc.Dataset(folder)
    for name in columns:
        one = dataset.select_columns([name])
        check(one, {name: columns[name]}, range(len(dataset)))
    two = tc.Dataset(folder, columns=list(columns)[-2:])
    check(two, {name: columns[name] for name in list(columns)[-2:]}, range(len(dataset)))


def test_a_shuffled_epoch_serves_each_record_once_on_any_number_of_ranks(written):
    folder, columns = written
    expected = sorted(keys_of_columns(columns))
    dataset = tc.Dataset(folder)
    found, _ = epoch(dataset, columns)
    assert [key_of(record) for record in found] != keys_of_columns(columns)
    assert sorted(map(key_of, found)) == expected
    n = len(expected) // 3 * 3
    ranks = [key_of(record) for rank in range(3) for record in epoch(dataset, columns, ranks=3, rank=rank)[0]]
    assert n <= len(ranks) <= n + 3
    assert set(ranks) <= set(expected)


def test_a_run_resumes_in_the_middle_on_another_number_of_ranks(written):
    folder, columns = written
    whole, _ = epoch(tc.Dataset(folder), columns)
    first, state = epoch(tc.Dataset(folder), columns, n_batches=4)
    rest = []
    for rank in range(2):
        rest += epoch(tc.Dataset(folder), columns, ranks=2, rank=rank, state=state)[0]
    assert sorted(map(key_of, first + rest)) == sorted(map(key_of, whole))
    moved = folder.with_name("moved")
    shutil.copytree(folder, moved)
    again = epoch(tc.Dataset(moved), columns, state=state)[0]
    assert list(map(key_of, first + again)) == list(map(key_of, whole))


def test_a_state_of_other_files_is_refused(written):
    folder, columns = written
    _, state = epoch(tc.Dataset(folder), columns, n_batches=2)
    files = [file for file in opened(tc.Dataset(folder)).layout.files if file.total_records]
    if len(files) < 2:
        pytest.skip("a data set of one file")
    (folder / files[-1].info.key).unlink()
    with pytest.raises((ObjectChanged, SchemaError)):  # an index that lists the file says that it is missing
        epoch(tc.Dataset(folder), columns, state=state)


def test_it_pickles_with_its_files_and_serves_threads_and_views(written):
    folder, columns = written
    dataset = pickle.loads(pickle.dumps(tc.Dataset(folder)))
    n = len(dataset)
    errors = []

    def read(seed):
        some = random.Random(seed).sample(range(n), min(n, 30))
        try:
            check((dataset[i] for i in some), columns, some)
        except BaseException as error:  # noqa: BLE001 -- shown by the test
            errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    chosen = dataset.select(list(range(n - 1, n // 2, -3)))
    check(chosen, columns, range(n - 1, n // 2, -3))
    check(dataset.take(5) + dataset.skip(n - 5), columns, [*range(5), *range(n - 5, n)])


def test_it_is_read_through_the_cache_which_then_needs_the_source_no_more(written, tmp_path):
    folder, columns = written
    with Cache(tmp_path / "cache", size="1GB") as cache:
        dataset = tc.Dataset(folder, cache=cache)
        dataset.warm()
        found, _ = epoch(dataset, columns)
        assert sorted(map(key_of, found)) == sorted(keys_of_columns(columns))
        dataset.close()
        for file in opened(dataset).layout.files:
            (folder / file.info.key).rename(folder / f".{Path(file.info.key).name}.away")
        found, _ = epoch(dataset, columns)
        assert sorted(map(key_of, found)) == sorted(keys_of_columns(columns))
        dataset.close()


def test_bit_rot_in_the_cache_is_found_and_mended(written, tmp_path):
    folder, columns = written
    with Cache(tmp_path / "cache", size="1GB") as cache:
        dataset = tc.Dataset(folder, cache=cache)
        dataset.warm()
        dataset.close()
        for copy in (tmp_path / "cache" / "copies").iterdir():
            if "." not in copy.name:
                data = bytearray(copy.read_bytes())
                for at in range(0, len(data), 101):
                    data[at] ^= 0x5A
                copy.chmod(0o600)
                copy.write_bytes(data)
        found, _ = epoch(dataset, columns)
        assert sorted(map(key_of, found)) == sorted(keys_of_columns(columns))
        dataset.close()


def test_the_ranges_of_blocks_lie_in_the_file_in_order(written):
    folder, columns = written
    layout = opened(tc.Dataset(folder)).layout
    for file in layout.files:
        assert (file.index.n_records > 0).all()
        assert (file.index.raw_bytes > 0).all()
        blocks = range(len(file.index.n_records))
        for some in ([block] for block in blocks):
            ranges = layout.ranges(file, some, list(columns))
            assert all(0 <= one.start <= one.end <= file.info.n_bytes for one in ranges)
        every = layout.ranges(file, blocks, list(columns))
        assert all(a.end <= b.start for a, b in pairwise(every))


@pytest.mark.parametrize("seed", range(12))
def test_damaged_files_raise_errors_that_name_a_file_and_never_hang_or_crash(written, seed):
    folder, columns = written
    chance = random.Random(seed)
    files = [folder / file.info.key for file in opened(tc.Dataset(folder)).layout.files]
    victim = chance.choice(files)
    data = bytearray(victim.read_bytes())
    if seed % 2:
        del data[chance.randrange(len(data)) :]
    else:
        for _ in range(chance.choice([1, 20, 200])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    victim.write_bytes(data)
    try:
        dataset = tc.Dataset(folder)
        list(dataset)
        for number in range(len(dataset))[::17]:
            dataset[number]
        epoch(dataset, columns)
        message = victim.name  # a format without checksums serves other values
    except TierCacheError as error:
        message = str(error)
    assert victim.name in message or str(folder) in message


def test_a_file_that_is_replaced_while_it_is_read_is_an_error_and_never_a_mixture(written):
    folder, _ = written
    dataset = tc.Dataset(folder)
    _ = dataset[0]
    files = opened(dataset).layout.files
    target = folder / files[0].info.key
    target.write_bytes(target.read_bytes()[: files[0].info.n_bytes // 2])
    dataset.close()
    with pytest.raises(TierCacheError):
        list(dataset)


def test_an_index_is_kept_and_made_again_if_it_is_damaged(written, tmp_path):
    folder, columns = written
    n = len(tc.Dataset(folder))
    kept = [path for path in (tmp_path / "default-cache" / "indexes").rglob("*") if path.is_file()]
    for path in kept:
        path.write_bytes(path.read_bytes()[:-20])
    assert len(tc.Dataset(folder)) == n
    check(tc.Dataset(folder), columns, range(n))
    with suppress(FileNotFoundError):
        shutil.rmtree(tmp_path / "default-cache")
    (tmp_path / "default-cache").write_text("a file where the folder should be")
    assert len(tc.Dataset(folder)) == n


def test_a_version_of_it_is_refused(written):
    folder, _ = written
    with pytest.raises(TierCacheError):
        tc.Dataset(folder, version=3)
