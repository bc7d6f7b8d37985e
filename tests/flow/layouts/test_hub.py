"""Data sets of the Hugging Face Hub, read in place and packed; and splits, in repositories and in any other folder."""

import io
import pickle
import re
import subprocess
import sys
import tarfile
import threading
from contextlib import closing

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from tests.support.forks import ForkedChild
from tests.support.http_server import HttpFault
from tests.support.hub import Hub
from typer.testing import CliRunner

import tiercache as tc
from tiercache.cli.app import app
from tiercache.errors import NotFound, SchemaError, StoreError
from tiercache.store import open_store
from tiercache.waiting import wait_for


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "default-cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def hub():
    pytest.importorskip("huggingface_hub")
    with Hub() as hub:
        yield hub


def parquet(start, end):
    memory = io.BytesIO()
    pq.write_table(pa.table({"x": list(range(start, end))}), memory, row_group_size=10, compression="none")
    return memory.getvalue()


FILES = {
    "data/train-00000-of-00002.parquet": parquet(0, 50),
    "data/train-00001-of-00002.parquet": parquet(50, 100),
    "data/test-00000-of-00001.parquet": parquet(200, 230),
    "README.md": b"---\nlicense: mit\n---\nA data set.\n",
}
REPOSITORY = "hf://datasets/owner/name"
CARD = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: "data/train-*"
  - split: few
    path: [data/test-*]
- config_name: fr
  data_files: fr.parquet
---
"""


def opened(hub, url=REPOSITORY, **options):
    return tc.Dataset(url, storage_options={"endpoint": hub.url, **options})


def numbers(dataset):
    return [record["x"] for record in dataset]


def write(folder, files):
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


@pytest.mark.parametrize(
    "path", ["/train", "/data/train", "/data/train-*.parquet", "@main/train", "@v1/train", "@refs%2Fpr%2F1/train"]
)
def test_a_split_of_a_repository_is_read_by_name_or_by_wildcard(hub, path):
    for branch in ("main", "v1", "refs/pr/1"):
        hub.push("owner/name", FILES, branch)
    assert numbers(opened(hub, REPOSITORY + path)) == list(range(100))


def test_a_repository_of_several_splits_is_an_error_that_lists_them(hub):
    hub.push("owner/name", FILES)
    with pytest.raises(SchemaError, match=r"train \(2 files\), test \(1 file\); append one .*: /train, /test; or"):
        opened(hub)
    with pytest.raises(SchemaError, match=r"no split 'validation'; there are train, test"):
        opened(hub, f"{REPOSITORY}/validation")
    assert len(opened(hub, f"{REPOSITORY}/**/*.parquet")) == 130


def test_the_commit_is_found_once_so_that_later_epochs_and_processes_read_the_same_files(hub):
    commit = hub.push("owner/name", FILES)
    dataset = opened(hub, f"{REPOSITORY}/train")
    assert f"@{commit}" in repr(dataset)
    hub.push("owner/name", {path: data.replace(b"\0", b"\1") for path, data in FILES.items()})
    copy = pickle.loads(pickle.dumps(dataset))
    hub.server.log.clear()
    assert numbers(dataset) == numbers(copy) == list(range(100))
    assert all(commit in path for path in hub.requests("/"))


def test_the_fingerprint_is_that_of_the_files_of_the_commit(hub):
    def of(files):
        hub.push("owner/name", files)
        with closing(opened(hub, f"{REPOSITORY}/train")) as dataset:
            return dataset.fingerprint

    assert len(parquet(50, 100)) == len(parquet(51, 101))
    first = of(FILES)
    assert of(FILES | {"README.md": b"other words"}) == first
    assert of(FILES | {"data/train-00001-of-00002.parquet": parquet(51, 101)}) != first


def test_what_is_in_the_cache_serves_the_next_commit_too(hub):
    hub.push("owner/name", FILES)
    assert numbers(opened(hub, f"{REPOSITORY}/train")) == list(range(100))
    commit = hub.push("owner/name", FILES | {"README.md": b"other words"})
    hub.server.log.clear()
    assert numbers(opened(hub, f"{REPOSITORY}/train")) == list(range(100))
    assert not [path for path in hub.requests(commit) if path.endswith(".parquet")]


def test_a_process_lists_a_commit_once(hub):
    hub.push("owner/name", FILES)
    assert numbers(opened(hub, f"{REPOSITORY}/train")) == list(range(100))
    assert len([path for path in hub.requests("tree") if "recursive=true" in path.lower()]) == 1
    assert len([path for path in hub.requests("/api/") if "tree" not in path]) <= 4


def test_the_configurations_of_readme_are_splits_of_their_files(hub, tmp_path):
    hub.push("owner/name", FILES | {"fr.parquet": parquet(7, 9), "README.md": CARD, "other.parquet": b"no"})
    with pytest.raises(
        SchemaError, match=r"several configurations .*: en, fr; append one of them to the URL: /en, /fr;"
    ):
        opened(hub)
    with pytest.raises(SchemaError, match=r"train \(2 files\), few \(1 file\)"):
        opened(hub, f"{REPOSITORY}/en")
    assert numbers(opened(hub, f"{REPOSITORY}/en/few")) == list(range(200, 230))
    assert numbers(opened(hub, f"{REPOSITORY}/fr")) == [7, 8]
    tc.pack(f"{REPOSITORY}/en/train", tmp_path / "packed", source_options={"endpoint": hub.url})
    assert numbers(tc.Dataset(tmp_path / "packed")) == list(range(100))


def test_a_configuration_comes_before_a_folder_of_its_name(hub, tmp_path):
    card = CARD.replace(b"data/t", b"en/t")
    hub.push("owner/name", {"en/train-1.parquet": parquet(0, 3), "en/test-2.parquet": parquet(3, 5), "README.md": card})
    for path, expected in {"en/few": [3, 4], "en/train": [0, 1, 2]}.items():
        assert numbers(opened(hub, f"{REPOSITORY}/{path}")) == expected
        tc.pack(f"{REPOSITORY}/{path}", tmp_path / path, source_options={"endpoint": hub.url})
        assert numbers(tc.Dataset(tmp_path / path)) == expected
    with pytest.raises(SchemaError, match="no split 'test'; there are train, few"):
        opened(hub, f"{REPOSITORY}/en/test")
    hub.push("owner/name", {"en/train-1.parquet": parquet(0, 3), "en/test-2.parquet": parquet(3, 5)})
    assert numbers(opened(hub, f"{REPOSITORY}/en/test")) == [3, 4]
    tc.pack(f"{REPOSITORY}/en/test", tmp_path / "test", source_options={"endpoint": hub.url})
    assert numbers(tc.Dataset(tmp_path / "test")) == [3, 4]


def test_the_default_configuration_is_read_and_data_files_may_be_left_out(hub):
    card = b"---\nconfigs:\n- config_name: a\n  data_dir: a\n  default: true\n- config_name: b\n  data_dir: b\n---\n"
    hub.push("owner/name", {"a/1.parquet": parquet(0, 3), "b/1.parquet": parquet(3, 5), "README.md": card})
    assert numbers(opened(hub)) == [0, 1, 2]
    assert numbers(opened(hub, f"{REPOSITORY}/b")) == [3, 4]


def test_a_mirror_of_a_repository_has_the_same_configurations_and_splits(tmp_path):
    pytest.importorskip("huggingface_hub")
    write(tmp_path / "mirror", FILES | {"fr.parquet": parquet(7, 9), "README.md": CARD, "other.parquet": b"no"})
    with pytest.raises(SchemaError, match=r"en, fr; append one of them to the URL: /data, /fr\.parquet;"):
        tc.Dataset(tmp_path / "mirror")
    write(tmp_path / "mirror", {"README.md": CARD.replace(b"fr", b"default").replace(b"split: few", b"split: train")})
    (tmp_path / "mirror/fr.parquet").rename(tmp_path / "mirror/default.parquet")
    assert numbers(tc.Dataset(tmp_path / "mirror")) == [7, 8]


def test_a_card_that_cannot_be_read_is_an_error(tmp_path):
    pytest.importorskip("huggingface_hub")
    for text in (b"configs: [", b"configs: [5]", b"configs: 5", b"configs:\n- data_files: [{a: 5}]"):
        write(tmp_path, {"a.parquet": parquet(7, 9), "README.md": b"---\n" + text + b"\n---\n"})
        with pytest.raises(SchemaError, match=r"README\.md: its configurations cannot be read"):
            tc.Dataset(tmp_path)
    write(tmp_path, {"README.md": b"---\nlicense: [\n---\n"})  # not read, as it has no configurations
    assert numbers(tc.Dataset(tmp_path)) == [7, 8]


def test_a_private_repository_needs_a_token(hub):
    hub.push("owner/name", FILES)
    hub.tokens["owner/name"] = "hf_secret"
    refused = pytest.raises(NotFound, match=r"owner/name/train: .*private: give a token .*'token'.*HF_TOKEN")
    with refused as caught:
        opened(hub, f"{REPOSITORY}/train", token="hf_wrong")
    assert "hf_wrong" not in str(caught.value)
    assert numbers(opened(hub, f"{REPOSITORY}/train", token="hf_secret")) == list(range(100))


def test_missing_repositories_and_revisions_are_named(hub):
    hub.push("owner/name", FILES)
    with pytest.raises(NotFound, match="owner/other: no such repository"):
        opened(hub, "hf://datasets/owner/other")
    with pytest.raises(NotFound, match="@v9: the repository has no branch, tag or commit of this name"):
        opened(hub, f"{REPOSITORY}@v9")
    with pytest.raises(NotFound, match=f"@{'0' * 40}/train: .*the repository has no branch, tag or commit"):
        opened(hub, f"{REPOSITORY}@{'0' * 40}/train")
    with pytest.raises(StoreError, match="hf://datasets/owner"):
        opened(hub, "hf://datasets/owner")
    with pytest.raises(NotFound, match="nothing/here: no data set here"):
        opened(hub, f"{REPOSITORY}/nothing/here")


def test_a_request_that_fails_is_repeated_and_a_hub_that_is_gone_is_named(hub):
    hub.push("owner/name", FILES)
    hub.faults = [HttpFault("status", 503)]
    assert numbers(opened(hub, f"{REPOSITORY}/test")) == list(range(200, 230))
    hub.faults = [HttpFault("status", 403)] * 100
    with pytest.raises(StoreError, match=r"owner/name/train: find the commit: .*403") as caught:
        opened(hub, f"{REPOSITORY}/train")
    assert (caught.value.status, caught.value.retryable) == (403, False)
    hub.faults = [HttpFault("drop")] * 100
    with pytest.raises(StoreError, match=r"owner/name/train: find the commit: .*reset by peer") as caught:
        opened(hub, f"{REPOSITORY}/train", timeout=0.5)
    assert caught.value.retryable


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_was_forked_during_a_listing_lists_by_itself(hub):
    commit = hub.push("owner/name", FILES)
    url, found = f"{REPOSITORY}@{commit}", []

    def keys():
        with closing(open_store(url, endpoint=hub.url)) as store:
            return [info.key for info in store.list()]

    hub.faults = [HttpFault("silence")]
    lister = threading.Thread(target=lambda: found.extend(keys()))
    lister.start()
    wait_for(lambda: not hub.faults, 10)
    end = ForkedChild(lambda tell: tell(str(len(keys()))), with_threads=True).wait(10)
    hub.server.release()
    lister.join()
    assert (end.lines, end.hung) == ((str(len(FILES)),), False), end.error
    assert len(found) == len(FILES)


def test_packing_reads_one_commit_and_one_split(hub, tmp_path):
    hub.push("owner/name", FILES)
    options = {"endpoint": hub.url}
    with pytest.raises(SchemaError, match=r"train \(2 files\), test \(1 file\)"):
        tc.pack(REPOSITORY, tmp_path / "packed", source_options=options)
    tc.pack(f"{REPOSITORY}/test", tmp_path / "packed", source_options=options, workers=2)
    assert numbers(tc.Dataset(tmp_path / "packed")) == list(range(200, 230))


def test_without_the_package_the_error_names_the_command_that_installs_it(tmp_path):
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import tiercache as tc\n"
        "try: tc.Dataset('hf://datasets/owner/name')\n"
        "except tc.StoreError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'tiercache-data[hub]'" in done.stdout, done.stderr


@pytest.mark.parametrize("pack", [False, True])
def test_splits_in_a_folder_are_not_mixed(tmp_path, pack):
    write(tmp_path / "in", {"train-0.parquet": parquet(0, 3), "train-1.parquet": parquet(3, 6), "val.parquet": b""})

    def read(path):
        if pack:
            tc.pack(path, tmp_path / "packed", mode="overwrite")
        return numbers(tc.Dataset(tmp_path / "packed" if pack else path))

    with pytest.raises(
        SchemaError, match=r"in: several splits would be mixed: train \(2 files\), validation \(1"
    ) as one:
        read(tmp_path / "in")
    way = re.search(r"the URL: /(train\S*),", str(one.value))
    assert way is not None
    assert read(f"{tmp_path}/in/{way[1]}") == list(range(6))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "feather", "tar", "arrow"])
def test_splits_of_every_kind_of_records_are_not_mixed(tmp_path, ending):
    table = pa.table({"x": [1, 2]})
    for split in ("train", "test"):
        path = tmp_path / "in" / f"{split}-00000.{ending}"
        path.parent.mkdir(exist_ok=True)
        if ending in ("arrow", "feather"):
            pyarrow.feather.write_feather(table, path, compression="uncompressed")
        elif ending == "tar":
            with tarfile.open(path, "w") as tar:
                tar.addfile(tarfile.TarInfo("a.txt"))
        else:
            path.write_text('{"x": 1}\n' if ending == "jsonl" else "x\n1\n")
    message = rf"train \(1 file\), test \(1 file\); append .*: /train-00000\.{ending}, /test-00000\.{ending};"
    with pytest.raises(SchemaError, match=message):
        tc.pack(tmp_path / "in", tmp_path / "packed")
    if ending in ("feather", "tar", "arrow"):
        with pytest.raises(SchemaError, match=message):
            tc.Dataset(tmp_path / "in")
    version = tc.pack(tmp_path / "in", tmp_path / "packed", exclude=["test-*"])
    assert version.n_records == (1 if ending in ("jsonl", "csv", "tar") else 2)


def test_folders_name_splits_and_partitions_do_not(tmp_path):
    write(tmp_path / "in", {"my-train/a.parquet": parquet(0, 3), "test/a.parquet": parquet(3, 6)})
    with pytest.raises(SchemaError, match=r"train \(1 file\), test \(1 file\); append .* /my-train, /test;"):
        tc.Dataset(tmp_path / "in")
    write(tmp_path / "in2", {"split=train/a.parquet": parquet(0, 3), "split=test/a.parquet": parquet(3, 6)})
    assert sorted(numbers(tc.Dataset(tmp_path / "in2"))) == list(range(6))


def test_a_file_beside_those_of_a_split_is_not_left_out_silently(tmp_path):
    write(tmp_path / "in", {"train.parquet": parquet(0, 3), "more.parquet": parquet(3, 6)})
    with pytest.raises(SchemaError, match=r"train \(1 file\), files of no split \(1 file\)"):
        tc.Dataset(tmp_path / "in")
    assert numbers(tc.Dataset(f"{tmp_path}/in/*.parquet")) == [3, 4, 5, 0, 1, 2]


@pytest.mark.parametrize("name", ["photos", "my photos"])
def test_files_that_are_no_data_set_are_an_error_that_names_the_command_for_them(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {f"{name}/a.jsonl": b'{"x": 5}\n', "data.csv": b"x\n5\n"})
    for source in (name, "data.csv"):
        with pytest.raises(NotFound) as caught:
            tc.Dataset(source)
        command = re.search(r"`tiercache (pack ('.*?'|\S+) ('.*?'|\S+))`", str(caught.value))
        assert command is not None
        assert command[2].strip("'") == source
        done = CliRunner().invoke(app, [one.strip("'") for one in ("pack", command[2], command[3])])
        assert done.exit_code == 0, done.output
        assert numbers(tc.Dataset(command[3].strip("'"))) == [5]
        assert f"tiercache.pack({source!r}, " in str(caught.value)


def test_the_command_for_files_of_a_store_has_its_url():
    with closing(open_store("memory://photos-of-a-test/a")) as store:
        store.put("1.npy", b"x")
    with pytest.raises(
        NotFound, match=r"\.pack\('memory://photos-of-a-test/a', 'memory://photos-of-a-test/a-packed'\)"
    ):
        tc.Dataset("memory://photos-of-a-test/a")


def test_the_command_for_files_of_the_hub_writes_beside_the_user(hub):
    hub.push("owner/name", {"a.jsonl": b'{"x": 5}\n'})
    with pytest.raises(NotFound, match="`tiercache pack hf://datasets/owner/name name-packed`"):
        opened(hub)
