"""Load: the nearest complete copy, corrupt copies, what goes into the caller's objects, and differences of keys."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.checkpoint_files import START_S, write_checkpoint
from tests.support.checkpoint_reader import same
from tests.support.faults import Fault, FaultKind, FaultStore
from torch import nn

from tiercache.cache import Cache
from tiercache.checkpoint import loading
from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.checkpoint.format import MANIFEST_NAME
from tiercache.errors import CorruptCheckpoint, NotFound, StoreError
from tiercache.store import LocalFolder


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 2)


def trained(seed=0, width=8, steps=2):
    """A module and an optimizer after some steps."""
    torch.manual_seed(seed)
    net = Net(width)
    optim = torch.optim.AdamW(net.parameters(), lr=0.01)
    for _ in range(steps):
        net.zero_grad()
        net.head(net.norm(net.body(torch.randn(4, width)))).square().mean().backward()
        optim.step()
    return net, optim


@pytest.fixture
def remote(tmp_path):
    return LocalFolder(tmp_path / "remote")


@pytest.fixture
def local(tmp_path):
    return LocalFolder(tmp_path / "local")


def flip(store, key, at=-1):
    """Invert a bit of a stored object."""
    data = bytearray(store.get(key))
    data[at] ^= 1
    store.put(key, bytes(data))


def tensor_files(store, name):
    return sorted(info.key for info in store.list(f"{name}/") if info.key.endswith(".safetensors"))


# -- data ----------------------------------------------------------------------------------------------------------


def test_a_state_comes_back_as_data_bit_by_bit(remote):
    net, optim = trained()
    state = {
        "model": net.state_dict(),
        "optim": optim.state_dict(),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "pairs": torch.randn(2, 2, dtype=torch.complex128),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
        "values": {"a": [1, None, "x", float("inf")], (1, 2): True},
    }
    write_checkpoint(remote, 5, state)
    assert same(Checkpoints(remote).load(), state)


def test_map_location_is_one_device_and_others_are_refused_before_anything_is_read(remote):
    write_checkpoint(remote, 1, {"a": torch.ones(2)})
    assert Checkpoints(remote).load(map_location="meta")["a"].device.type == "meta"
    broken = FaultStore(remote, [Fault("read_into", times=100)])
    for value in ("cud:0", "cuda:99", {"cuda:0": "cpu"}, lambda storage, location: storage):
        with pytest.raises(ValueError, match=r"map_location=.* is not one device of this machine, such as 'cpu'"):
            Checkpoints(broken).load(map_location=value)


def test_files_longer_than_a_piece_are_read_in_pieces(remote, monkeypatch):
    monkeypatch.setattr(loading, "PIECE_BYTES", 5000)
    monkeypatch.setattr(loading, "_STEP_BYTES", 700)
    state = {f"t{n}": torch.randn(n * 37 + 1) for n in range(40)}
    write_checkpoint(remote, 1, state)
    assert same(Checkpoints(remote).load(), state)


def test_many_files_are_read_with_few_open_ones(remote, monkeypatch):
    monkeypatch.setattr(loading, "_OPEN_FILES", 2)
    state = {f"t{n}": torch.full((4,), n) for n in range(30)}
    write_checkpoint(remote, 1, state, n_files=30)
    opened = []
    open_local = remote.open_local

    def count(key, identity=None):
        opened.append(sum(1 for path in Path("/proc/self/fd").iterdir() if "tensors" in str(path.resolve())))
        return open_local(key, identity)

    monkeypatch.setattr(remote, "open_local", count)
    assert same(Checkpoints(remote).load(), state)
    assert max(opened) <= 2


# -- into objects --------------------------------------------------------------------------------------------------


def test_parameters_are_filled_in_their_own_memory(remote):
    net, optim = trained()
    write_checkpoint(remote, 1, {"model": net, "optim": optim})
    again, optim_again = trained(seed=1)
    before = {key: value.data_ptr() for key, value in again.state_dict().items()}
    Checkpoints(remote).load(into={"model": again, "optim": optim_again})
    assert {key: value.data_ptr() for key, value in again.state_dict().items()} == before
    assert same(optim_again.state_dict(), optim.state_dict())


def test_tied_weights_are_filled_and_stay_tied(remote):
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    write_checkpoint(remote, 1, {"model": net})
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    apart = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    checkpoints = Checkpoints(remote)
    checkpoints.load(into={"model": tied})
    checkpoints.load(into={"model": apart})
    assert tied[1].weight is tied[0].weight
    for loaded in (tied, apart):
        assert torch.equal(loaded[0].weight, net[0].weight)
        assert torch.equal(loaded[1].weight, net[0].weight)


def test_tensors_arrays_and_values_of_a_dict_are_filled_in_place(remote):
    state = {"ema": {"w": torch.randn(3)}, "mean": np.arange(4.0), "epoch": 7, "turned": torch.randn(2, 3)}
    write_checkpoint(remote, 1, state)
    w, mean, turned = torch.zeros(3), np.zeros(4), torch.zeros(3, 2).t()
    into = {"ema": {"w": w}, "mean": mean, "epoch": 0, "turned": turned}
    loaded = Checkpoints(remote).load(into=into)
    assert [loaded[name] is into[name] for name in into] == [True] * len(loaded)
    assert torch.equal(w, state["ema"]["w"])
    assert np.array_equal(mean, state["mean"])
    assert torch.equal(turned, state["turned"])
    assert into["epoch"] == 7


def test_weights_that_were_not_tied_are_loaded_into_tied_ones(remote):
    tied = nn.Linear(3, 3)
    write_checkpoint(remote, 1, {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Checkpoints(remote).load(into={"a": tied, "b": tied})
    data = Checkpoints(remote).load()
    assert same(dict(tied.state_dict()), dict(data["b"]))


def test_a_list_of_tensors_is_replaced(remote):
    states = {"cuda": [torch.get_rng_state()], "numpy": np.random.get_state()}
    write_checkpoint(remote, 1, states)
    into = {"cuda": [torch.zeros(3)], "numpy": (np.zeros(2),)}
    Checkpoints(remote).load(into=into)
    assert torch.equal(into["cuda"][0], states["cuda"][0])
    assert np.array_equal(into["numpy"][1], states["numpy"][1])


def read_only():
    array = np.zeros(6)
    array.flags.writeable = False
    return array


UNFILLABLE = {
    "a read-only array": read_only,
    "a tensor on the device meta": lambda: torch.empty(6, device="meta"),
    "a sparse tensor": lambda: torch.zeros(6).to_sparse(),
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(3)], layout=torch.jagged),
}


def test_what_cannot_be_filled_is_named_before_anything_is_read(remote):
    write_checkpoint(remote, 1, {"first": torch.ones(3), "ema": {"w": torch.arange(6.0)}})
    for kind, made in UNFILLABLE.items():
        checkpoints, first = Checkpoints(remote), torch.zeros(3)
        with pytest.raises(ValueError, match=rf"cannot be filled \(1\): \s*ema\.w is {kind}"):
            checkpoints.load(into={"first": first, "ema": {"w": made()}})
        assert torch.equal(first, torch.zeros(3))
        with pytest.warns(RuntimeWarning, match="cannot be filled"):
            checkpoints.load(into={"first": first, "ema": {"w": made()}}, strict=False)
        assert torch.equal(first, torch.ones(3))


def test_all_parameters_of_a_module_without_memory_are_named(remote):
    net, _ = trained()
    write_checkpoint(remote, 1, {"model": net})
    with torch.device("meta"):
        bare = Net()
    with pytest.raises(ValueError, match=r"cannot be filled \(9\)(.|\n)*model\.body\.weight(.|\n)*to_empty"):
        Checkpoints(remote).load(into={"model": bare})
    bare.to_empty(device="cpu")
    Checkpoints(remote).load(into={"model": bare})
    assert same(dict(bare.state_dict()), dict(net.state_dict()))


def test_a_tensor_of_any_type_fills_an_array_of_wider_numbers(remote):
    dtypes = (torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.int64, torch.bool)
    write_checkpoint(remote, 1, {str(dtype): torch.tensor([0, 1, 1]).to(dtype) for dtype in dtypes})
    arrays = {str(dtype): np.ones(6)[::2] for dtype in dtypes}
    Checkpoints(remote).load(into=arrays)
    assert all(array.tolist() == [0, 1, 1] for array in arrays.values())


def test_tensors_with_gaps_views_and_subclasses_are_filled(remote):
    class Own(torch.Tensor):
        pass

    whole = torch.zeros(3, 4, dtype=torch.complex64)
    into = {
        "column": whole.real[:, 1],
        "conjugate": torch.zeros(3, dtype=torch.complex64).conj(),
        "own": torch.zeros(3).as_subclass(Own),
        "leaf": torch.zeros(3, requires_grad=True),
        "reversed": np.zeros(3)[::-1],
    }
    write_checkpoint(remote, 1, {key: torch.arange(3.0) for key in into})
    Checkpoints(remote).load(into=into)
    assert all(value.tolist() == [0, 1, 2] for value in into.values())
    assert whole.real[:, 1].tolist() == [0, 1, 2]
    assert type(into["own"]) is Own


class Sharded(torch.Tensor):
    device_mesh = "a mesh"


def test_an_object_that_load_can_neither_fill_nor_replace_is_refused(remote):
    rng, net = torch.get_rng_state(), nn.Linear(1, 1)
    write_checkpoint(remote, 1, {"rng": rng, "params": [torch.ones(2)], "w": torch.ones(2)})
    checkpoints = Checkpoints(remote)
    for into, text in (
        (net, "into is a dict such as"),
        ({"params": [net]}, r"into\['params'\] cannot be filled.*dict"),
        ({"rng": torch.Generator()}, r"into\['rng'\] cannot be filled: .* got Generator"),
        ({"params": [nn.Parameter(torch.zeros(2))]}, r"into\['params'\] .*: it is a list of objects or parameters"),
        (
            {"w": torch.zeros(2).as_subclass(Sharded)},
            r"into\['w'\] is sharded .*torch\.distributed\.checkpoint",
        ),
    ):
        with pytest.raises(TypeError, match=text):
            checkpoints.load(into=into)
    assert torch.equal(checkpoints.load(into={"rng": None})["rng"], rng)


def test_keys_of_another_type_are_told_apart_in_the_error(remote):
    write_checkpoint(remote, 1, {"x": {0: 1}})
    with pytest.raises(ValueError, match=r"checkpoint \(1\): x\.0\n.*\(1\): x\[0\]\nNothing"):
        Checkpoints(remote).load(into={"x": {"0": 1}})


def test_latest_says_which_later_checkpoint_is_incomplete(remote):
    write_checkpoint(remote, 1, {"n": 1})
    name = write_checkpoint(remote, 2, {"n": 2}, created_s=START_S + 100)
    remote.delete([f"{name}/state.json"])
    with pytest.warns(RuntimeWarning, match=f"{name}.*state.json"):
        assert Checkpoints(remote).load()["n"] == 1


def test_other_parameter_groups_of_an_optimizer_are_found_before_the_model_is_filled(remote):
    net, other = other_net(), other_net()
    write_checkpoint(remote, 1, {"model": net, "optim": torch.optim.SGD(net.parameters(), lr=0.1)})
    before = {key: value.clone() for key, value in other.state_dict().items()}
    fewer = torch.optim.SGD([*other.parameters()][:1], lr=0.1)
    with pytest.raises(ValueError, match=r"optim: parameter groups of \[\d+\] parameters in the checkpoint, \[1\]"):
        Checkpoints(remote).load(into={"model": other, "optim": fewer})
    assert same(other.state_dict(), before)


def test_tensors_that_several_ranks_stored_in_parts_are_put_together(remote):
    weight, bias = torch.randn(2, 8), torch.randn(2)

    def in_parts(tree):
        parts = [[[row, 0], [1, 8], {"$tensor": f"parts.{row}"}] for row in range(2)]
        return {
            "head": {"weight": {"$sharded": {"size": [2, 8], "dtype": "F32", "parts": parts}}, "bias": tree["bias"]}
        }

    state = {"parts": [weight[:1], weight[1:]], "bias": bias}
    write_checkpoint(remote, 1, state, edit_tree=in_parts)
    checkpoints = Checkpoints(remote)
    head = nn.Linear(8, 2)
    checkpoints.load(into={"head": head})
    assert torch.equal(head.weight, weight)
    assert torch.equal(head.bias, bias)
    assert torch.equal(checkpoints.load()["head"]["weight"], weight)
    with pytest.raises(ValueError, match=r"head\.weight: \[2, 8\] in the checkpoint, \[3, 8\] in the object"):
        checkpoints.load(into={"head": nn.Linear(8, 3)})


# -- strict --------------------------------------------------------------------------------------------------------


def other_net():
    net = Net()
    net.head, net.extra = nn.Linear(8, 3), nn.Linear(2, 2)
    del net.norm
    return net


def test_one_error_lists_all_missing_unexpected_and_misshaped_keys_and_nothing_is_changed(remote):
    net, _ = trained()
    write_checkpoint(remote, 1, {"model": net})
    into = {"model": other_net(), "optim": {}}
    before = {key: value.clone() for key, value in into["model"].state_dict().items()}
    with pytest.raises(ValueError, match="does not fit into=") as caught:
        Checkpoints(remote).load(into=into)
    text = str(caught.value)
    assert "missing in the checkpoint (3): model.extra.weight, model.extra.bias, optim" in text
    assert "unexpected: in the checkpoint only (5): model.norm.weight, model.norm.bias" in text
    assert "of another shape (2):" in text
    assert "model.head.weight: [2, 8] in the checkpoint, [3, 8] in the object" in text
    assert "Nothing was loaded" in text
    assert same(dict(into["model"].state_dict()), before)


def test_without_strict_everything_that_fits_is_loaded_and_the_rest_is_named_in_a_warning(remote):
    net, _ = trained()
    write_checkpoint(remote, 1, {"model": net})
    into = other_net()
    head = into.head.weight.clone()
    with pytest.warns(RuntimeWarning, match="of another shape"):
        Checkpoints(remote).load(into={"model": into}, strict=False)
    assert torch.equal(into.body.weight, net.body.weight)
    assert torch.equal(into.head.weight, head)


# -- which checkpoint ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_found_by_step_by_name_and_by_its_metric(remote):
    first = write_checkpoint(remote, 1, {"n": 1}, metrics={"loss": 0.5, "acc": 0.1})
    write_checkpoint(remote, 2, {"n": 2}, metrics={"loss": 0.25, "acc": 0.4})
    write_checkpoint(remote, 2, {"n": 22}, metrics={"loss": float("nan")}, nonce="00c0df")
    checkpoints = Checkpoints(remote)
    found = [checkpoints.load(which)["n"] for which in (1, 2, first, "best:loss", "best:loss:max", "best:acc:max")]
    assert found == [1, 22, 1, 2, 1, 2]


def test_the_error_for_a_checkpoint_that_does_not_exist_lists_what_there_is(remote):
    write_checkpoint(remote, 1, metrics={"loss": 0.5})
    checkpoints = Checkpoints(remote)
    with pytest.raises(NotFound, match=r"no complete checkpoint of step 7; .* steps 1, metrics: loss"):
        checkpoints.load(7)
    with pytest.raises(NotFound, match="with the metric 'acc'"):
        checkpoints.load("best:acc")
    with pytest.raises(ValueError, match="'latest', 'best:METRIC', a step or a name, got 'newest'"):
        checkpoints.load("newest")


# -- which copy ----------------------------------------------------------------------------------------------------


def both(local, remote, step=1):
    """A checkpoint in both tiers."""
    write_checkpoint(local, step, {"w": torch.full((100,), float(step))})
    return write_checkpoint(remote, step, {"w": torch.full((100,), float(step))})


def test_the_local_copy_is_read_where_there_is_one(local, remote):
    name = both(local, remote)
    remote.delete([info.key for info in remote.list(f"{name}/") if not info.key.endswith(MANIFEST_NAME)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(Checkpoints(remote, local=local.root).load()["w"], torch.ones(100))


@pytest.mark.parametrize("damage", ["bit", "gone", "short", "manifest"])
def test_a_corrupt_copy_is_skipped_with_a_warning(local, remote, damage):
    name = both(local, remote)
    (key, *_) = tensor_files(local, name)
    if damage == "bit":
        flip(local, key)
    elif damage == "gone":
        local.delete([key])
    elif damage == "short":
        local.put(key, local.get(key)[:-1])
    else:
        flip(local, f"{name}/{MANIFEST_NAME}", at=5)
    into = {"w": torch.zeros(100)}
    with pytest.warns(RuntimeWarning, match="this copy is skipped"):
        loaded = Checkpoints(remote, local=local.root).load(into=into)
    assert torch.equal(into["w"], torch.ones(100))
    assert (loaded["w"] is into["w"], loaded.name, loaded.url) == (True, name, f"{remote.url}/{name}")


def test_latest_goes_back_to_the_checkpoint_before_if_no_copy_of_the_newest_is_right(local, remote):
    write_checkpoint(remote, 1, {"n": torch.ones(1)})
    name = both(local, remote, step=2)
    for store in (local, remote):
        flip(store, tensor_files(store, name)[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(Checkpoints(remote, local=local.root).load()["n"], torch.ones(1))
    assert ["skipped" in str(one.message) for one in caught] == [True, True, False]
    assert "the checkpoint written before it is next" in str(caught[-1].message)
    with pytest.warns(RuntimeWarning, match="skipped"), pytest.raises(CorruptCheckpoint, match="CRC-32C"):
        Checkpoints(remote, local=local.root).load(2)


def test_local_checkpoints_are_loaded_while_the_store_cannot_be_reached(local, remote):
    both(local, remote)
    broken = FaultStore(remote, [Fault("list", times=10)])
    with pytest.warns(RuntimeWarning, match="only local checkpoints are considered"):
        assert torch.equal(Checkpoints(broken, local=local.root).load()["w"], torch.ones(100))


def test_a_failing_store_is_an_error_and_not_an_older_checkpoint(remote):
    write_checkpoint(remote, 1)
    write_checkpoint(remote, 2, {"w": torch.ones(4)})
    broken = FaultStore(remote, [Fault("read_into", times=100)])
    with pytest.warns(RuntimeWarning, match="skipped"), pytest.raises(StoreError, match="scripted fault"):
        Checkpoints(broken).load()


# -- through the cache ---------------------------------------------------------------------------------------------


class Bucket(FaultStore):
    """A store that counts as a remote one."""

    def __init__(self, inner, script=()):
        super().__init__(inner, script)
        self.url = f"s3://bucket/{Path(inner.url).name}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    with Cache(tmp_path / "cache", size="64MiB") as cache:
        monkeypatch.setattr(Cache, "default", lambda: cache)
        yield cache


def test_an_interrupted_load_continues_where_it_ended(remote, cache):
    state = {f"t{n}": torch.randn(1 << 19) for n in range(8)}
    write_checkpoint(remote, 1, state, n_files=8)
    bucket = Bucket(remote, [Fault("read_into", nth=4, times=1000, retryable=False)])
    with pytest.warns(RuntimeWarning, match="skipped"), pytest.raises(StoreError):
        Checkpoints(bucket).load()
    interrupted = remote.counters["bytes_read"]
    bucket = Bucket(remote)
    assert same(Checkpoints(bucket).load(), state)
    again = remote.counters["bytes_read"] - interrupted
    assert again < 8 * (1 << 21) - (1 << 20)


def test_a_corrupt_cached_copy_is_fetched_again(remote, cache, tmp_path):
    state = {"w": torch.randn(1 << 18)}
    write_checkpoint(remote, 1, state)
    Checkpoints(Bucket(remote)).load()
    copies = [path for path in Path(cache.path, "copies").iterdir() if path.stat().st_size > 1 << 20]
    assert copies
    for path in copies:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        with path.open("r+b") as file:
            file.write(data)
    assert same(Checkpoints(Bucket(remote)).load(), state)


def test_bytes_that_change_on_the_way_are_found(remote):
    write_checkpoint(remote, 1, {"w": torch.randn(1000)})

    class Plain(FaultStore):
        """Without local files."""

    flipping = Plain(remote, [Fault("read_into", times=50, kind=FaultKind.BIT_FLIP)])
    with pytest.warns(RuntimeWarning), pytest.raises(CorruptCheckpoint):
        Checkpoints(flipping).load()
