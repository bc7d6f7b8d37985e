"""Private files: modes, links, named pipes, temporary files."""

import os
import resource
import stat

import pytest

from tiercache.store.shared_files import (
    is_folder,
    link_whole,
    make_folder,
    maker_of,
    open_file,
    open_folder,
    read_text,
    replace_whole,
)


@pytest.fixture
def umasks():
    """The umasks, each set while its turn lasts."""
    before = os.umask(0)

    def each():
        for umask in (0o000, 0o022, 0o077, 0o777):
            os.umask(umask)
            yield umask

    yield each()
    os.umask(before)


def mode_of(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def test_files_and_folders_have_the_requested_mode_whatever_the_umask(tmp_path, umasks):
    for umask in umasks:
        for mode in (0o600, 0o640, 0o400):
            a, b, c = (tmp_path / f"{name}-{umask}-{mode}" for name in "abc")
            os.close(open_file(a, os.O_RDWR | os.O_CREAT, mode))
            link_whole(b, "text", mode)
            replace_whole(c, "text", mode)
            assert [*map(mode_of, (a, b, c))] == [mode] * 3, umask
        for mode in (0o700, 0o2750):
            folder = tmp_path / f"folder-{umask}-{mode}"
            assert [make_folder(folder, mode) for _ in range(2)] == [True, False]
            assert mode_of(folder) == mode, umask


def test_a_link_is_never_read_through(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "a").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic"):
        read_text(tmp_path / "a")
    with pytest.raises(OSError, match="symbolic"):
        open_file(tmp_path / "a", os.O_RDWR)


def test_a_link_in_place_of_a_new_file_is_removed_and_its_target_kept(tmp_path):
    (tmp_path / "target").write_text("keep")
    for name in "abc":
        (tmp_path / name).symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "not there")
    os.close(open_file(tmp_path / "a", os.O_RDWR | os.O_CREAT))
    os.close(open_file(tmp_path / "dangling", os.O_RDWR | os.O_CREAT))
    replace_whole(tmp_path / "b", "new")
    link_whole(tmp_path / "c", "new")
    assert (tmp_path / "target").read_text() == "keep"
    assert not (tmp_path / "not there").exists()
    assert [(tmp_path / name).is_symlink() for name in ("a", "b", "dangling")] == [False, False, False]
    assert (tmp_path / "b").read_text() == "new"
    assert (tmp_path / "c").is_symlink(), "something had the name: it is left to whoever reads it"


def test_a_named_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(OSError, match="regular"):
        read_text(tmp_path / "a")


def test_a_link_to_a_folder_is_no_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "real")
    for check in (is_folder, open_folder):
        with pytest.raises(NotADirectoryError):
            check(tmp_path / "a")
    with pytest.raises(NotADirectoryError, match="symbolic link"):
        make_folder(tmp_path / "a", 0o700)
    assert is_folder(tmp_path / "real")
    assert not is_folder(tmp_path / "nothing")


def test_a_file_is_linked_once_and_replaced_each_time(tmp_path):
    link_whole(tmp_path / "a", "first")
    link_whole(tmp_path / "a", "second")
    assert read_text(tmp_path / "a") == "first"
    replace_whole(tmp_path / "a", "third")
    assert read_text(tmp_path / "a") == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        for write in (link_whole, replace_whole):
            with pytest.raises(OSError, match="too large"):
                write(tmp_path / "a", 1000 * "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_a_temporary_file_identifies_its_writer(tmp_path, monkeypatch):
    seen = []
    really_link = os.link
    monkeypatch.setattr(os, "link", lambda src, dst, **kw: (seen.append(src.name), really_link(src, dst, **kw)))
    link_whole(tmp_path / "name.json", "text")
    assert maker_of(seen[0])[1] == os.getpid()
    assert maker_of("name.json") is None
    assert maker_of(".hidden") is None
