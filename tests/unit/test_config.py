"""Settings from file, environment and arguments; what the machine allows."""

import os
from pathlib import Path

import pytest

from tiercache import config
from tiercache.cache.eviction import POLICIES


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("TIERCACHE_") or name in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "LOCAL_SIZE",
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_default_cache_folder_is_in_the_users_cache_folder(tmp_path):
    assert config.read_settings() == config.Settings(cache_dir=tmp_path / "cache" / "tiercache", cache_size=None)


def test_a_relative_xdg_folder_counts_as_unset(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert config.read_settings().cache_dir == Path.home() / ".cache" / "tiercache"


def test_a_user_without_a_home_must_set_the_cache_folder(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    with pytest.raises(ValueError, match="no home folder for the cache: set TIERCACHE_CACHE_DIR"):
        config.read_settings()
    assert config.read_settings(cache_dir=tmp_path).cache_dir == tmp_path


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "work" / "tiercache.toml").mkdir()
    with pytest.raises(ValueError, match=r"tiercache\.toml: cannot be read: Is a directory"):
        config.read_settings()


def test_the_nearest_file_upwards_overrides_the_users(tmp_path):
    write(tmp_path / "config" / "tiercache" / "tiercache.toml", 'cache_size = "1GB"')
    assert config.read_settings().cache_size == "1GB"
    write(tmp_path / "work" / "tiercache.toml", 'cache_size = "2GB"\ncache_dir = "nvme"')
    assert config.read_settings() == config.Settings(cache_dir=tmp_path / "work" / "nvme", cache_size="2GB")
    write(tmp_path / "work" / "deep" / "tiercache.toml", "cache_size = 3000")
    assert config.read_settings().cache_size == "3000"
    assert config.read_settings(tmp_path / "work").cache_size == "2GB"


def test_the_environment_overrides_the_file_and_arguments_override_both(tmp_path, monkeypatch):
    write(tmp_path / "work" / "tiercache.toml", 'cache_size = "2GB"')
    monkeypatch.setenv("TIERCACHE_CACHE_SIZE", "80%")
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", "here")
    assert config.read_settings() == config.Settings(cache_dir=Path.cwd() / "here", cache_size="80%")
    assert config.read_settings(cache_size="5MB", cache_dir=None).cache_size == "5MB"
    monkeypatch.setenv("TIERCACHE_CACHE_SIZE", "")
    assert config.read_settings().cache_size == "2GB"


def test_the_home_folder_may_be_written_as_a_tilde():
    assert config.read_settings(cache_dir="~/nvme").cache_dir == Path.home() / "nvme"


def test_a_syntax_error_is_reported_with_file_and_line(tmp_path):
    path = write(tmp_path / "work" / "tiercache.toml", 'cache_size = "2GB"\ncache_dir = \n')
    with pytest.raises(ValueError, match=rf"{path}: not TOML: .*line 2"):
        config.read_settings()


def test_the_cache_can_be_set_in_file_and_environment(tmp_path, monkeypatch):
    write(tmp_path / "work" / "tiercache.toml", 'cache_policy = "lru"\ncache_dir = "copies/here"')
    settings = config.read_settings()
    assert settings.cache_policy == "lru"
    assert settings.cache_dir == tmp_path / "work" / "copies" / "here", "relative to the file's folder"
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", "here")
    assert config.read_settings().cache_dir == tmp_path / "work" / "deep" / "here"


def test_an_invalid_setting_of_the_cache_names_the_variable(monkeypatch):
    monkeypatch.setenv("TIERCACHE_CACHE_POLICY", "best")
    with pytest.raises(ValueError, match=r"TIERCACHE_CACHE_POLICY: cache_policy: .*'plan'"):
        config.read_settings()


def test_the_setting_accepts_every_eviction_policy():
    assert set(config.CHOICES["cache_policy"]) == set(POLICIES)


def test_an_unknown_key_is_an_error_with_a_suggestion(tmp_path):
    path = write(tmp_path / "work" / "tiercache.toml", 'cache_sise = "2GB"')
    with pytest.raises(ValueError, match=rf"{path}: unknown setting 'cache_sise'; did you mean 'cache_size'"):
        config.read_settings()
    write(path, "[prices]\nstandard = 1")
    with pytest.raises(ValueError, match="'prices'; the settings are cache_dir, cache_policy, cache_size, peers"):
        config.read_settings()
    write(path, "[teirs.hot]")
    with pytest.raises(ValueError, match="'teirs'; did you mean 'tiers'"):
        config.read_settings()
    write(path, "")
    with pytest.raises(ValueError, match=r"argument: .*'cache_folder'"):
        config.read_settings("/", cache_folder="x")


def test_tables_of_tiers_are_allowed_only_at_the_top_level(tmp_path):
    tables = "[tiers.hot]\nurl = 1\n[[rules]]\n[[pins]]\n[tiering]\n"
    write(tmp_path / "work" / "tiercache.toml", f'cache_size = "2GB"\n{tables}')
    assert config.read_settings().cache_size == "2GB"
    with pytest.raises(ValueError, match="argument: unknown setting 'tiers'"):
        config.read_settings(tiers={})


def test_the_default_state_folder_is_in_the_users_state_folder(tmp_path, monkeypatch):
    assert config.state_folder() == tmp_path / "state" / "tiercache"
    write(tmp_path / "work" / "tiercache.toml", 'state_dir = "state"')
    assert config.state_folder() == tmp_path / "work" / "state", "relative to the file's folder"
    assert config.state_folder(tmp_path) == tmp_path / "state" / "tiercache"
    monkeypatch.setenv("TIERCACHE_STATE_DIR", str(tmp_path / "nvme"))
    assert config.state_folder() == tmp_path / "nvme"


def test_a_user_without_a_home_must_set_the_state_folder(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_STATE_HOME")
    with pytest.raises(ValueError, match="no home folder for state: set TIERCACHE_STATE_DIR"):
        config.state_folder()


def test_a_misspelt_variable_is_an_error_but_an_unrelated_one_is_not(monkeypatch):
    monkeypatch.setenv("TIERCACHE_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("TIERCACHE_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("TIERCACHE_KERNEL", "portable")
    config.read_settings()
    monkeypatch.setenv("TIERCACHE_CACHESIZE", "1GB")
    with pytest.raises(
        ValueError, match=r"TIERCACHE_CACHESIZE: unknown setting 'cachesize'; did you mean 'cache_size'"
    ):
        config.read_settings()


@pytest.mark.parametrize(
    "text", ['cache_size = "much"', "cache_size = true", "cache_size = -1", "cache_size = []", "cache_dir = 7"]
)
def test_an_invalid_value_is_reported_with_file_and_key(tmp_path, text):
    path = write(tmp_path / "work" / "tiercache.toml", text)
    with pytest.raises(ValueError, match=rf"{path}: cache_(size|dir): \S"):
        config.read_settings()


def test_a_bad_variable_is_named(monkeypatch):
    monkeypatch.setenv("TIERCACHE_CACHE_SIZE", "much")
    with pytest.raises(ValueError, match="environment variable TIERCACHE_CACHE_SIZE: cache_size: not a size: 'much'"):
        config.read_settings()


def test_ranks_come_from_the_environment(monkeypatch):
    assert config.distributed_environment() is None
    monkeypatch.setenv("RANK", "5")
    assert config.distributed_environment() is None
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert config.distributed_environment() == (5, 8, 0, 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert config.distributed_environment() == (5, 8, 0, 1)  # how many ranks its machine has is not known
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert config.distributed_environment() == (5, 8, 1, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert config.distributed_environment() == (5, 8, 1, 4)
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(ValueError, match="RANK=8 and WORLD_SIZE=8"):
        config.distributed_environment()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK: not a whole number: 'first'"):
        config.distributed_environment()


def test_memory_limit_is_the_smallest_limit_of_cgroup_v2_and_its_parents(tmp_path):
    write(tmp_path / "proc/self/cgroup", "0::/pod/box\n")
    write(tmp_path / "sys/fs/cgroup/pod/box/memory.max", "max\n")
    write(tmp_path / "sys/fs/cgroup/pod/memory.max", "1048576\n")
    assert config.memory_limit_bytes(tmp_path) == 1048576


def test_memory_limit_of_cgroup_v1_is_read_at_the_mounted_root(tmp_path):
    write(tmp_path / "proc/self/cgroup", "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n")
    limit = write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", "2097152\n")
    assert config.memory_limit_bytes(tmp_path) == 2097152
    limit.write_text("9223372036854771712\n")
    assert config.memory_limit_bytes(tmp_path) == config.memory_limit_bytes(tmp_path / "nothing") > 1 << 28


def test_available_cpus_are_limited_by_the_quota_of_both_cgroup_versions(tmp_path):
    assert config.available_cpus(tmp_path) == len(os.sched_getaffinity(0))
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    quota = write(tmp_path / "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert config.available_cpus(tmp_path) == len(os.sched_getaffinity(0))
    quota.write_text("50000 100000\n")
    assert config.available_cpus(tmp_path) == 1
    write(tmp_path / "proc/self/cgroup", "5:cpu,cpuacct:/\n")
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "20000\n")
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert config.available_cpus(tmp_path) == 1
