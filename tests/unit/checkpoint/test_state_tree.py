"""States as trees of JSON values and tensors."""

import collections
import dataclasses
import enum
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiercache.checkpoint.state_tree import DTYPES, decode_state, encode_state, parse_state, state_text


def stored(state):
    """The encoded state, and the state that its text and tensors decode to."""
    encoded = encode_state(state)

    def find(name, library):
        source = encoded.tensors[encoded.aliases.get(name, name)]
        assert isinstance(source.value, torch.Tensor if library == "torch" else np.ndarray)
        return source.value.clone() if library == "torch" else source.value.copy()

    return encoded, decode_state(parse_state(state_text(encoded.tree)), find)


def read_back(state):
    return stored(state)[1]


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
scalars |= st.complex_numbers(allow_nan=False)
keys = st.text() | st.integers() | st.none() | st.tuples(st.integers(), st.text())
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.tuples(inner, inner), max_leaves=8
)


@given(st.dictionaries(keys, values))
def test_values_of_python_come_back_equal_and_with_their_types(state):
    found = read_back(state)
    assert found == state
    assert repr(found) == repr(state)


def test_a_tensor_of_any_type_is_stored_as_it_is():
    for dtype in DTYPES.values():
        tensor = torch.arange(6).to(getattr(torch, dtype)).reshape(2, 3)
        encoded, found = stored({"a": {"b": tensor}})
        assert encoded.tree == {"a": {"b": {"$tensor": "a.b"}}}
        assert (DTYPES[encoded.tensors["a.b"].dtype], encoded.tensors["a.b"].n_bytes) == (dtype, tensor.nbytes)
        assert torch.equal(found["a"]["b"].view(torch.uint8), tensor.view(torch.uint8)), dtype


class WithState:
    def state_dict(self):
        return {"n": 3, "inner": [torch.ones(2)]}


def test_a_state_dict_keeps_the_versions_of_its_modules():
    found = read_back({"model": torch.nn.BatchNorm1d(2)})["model"]
    assert found._metadata == torch.nn.BatchNorm1d(2).state_dict()._metadata


def test_tied_weights_are_stored_once_under_both_names():
    weight = torch.ones(3, 4)
    encoded, found = stored({"embed": weight, "head": {"w": weight}, "part": weight[:2], "copy": weight.clone()})
    assert set(encoded.tensors) == {"embed", "part", "copy"}
    assert encoded.aliases == {"head.w": "embed"}
    assert torch.equal(found["head"]["w"], weight)


def test_keys_that_give_one_name_are_told_apart():
    state = {
        "a.b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
        "__metadata__": torch.full((1,), 2.0),
        "\ud800": torch.ones(2),
    }
    encoded, found = stored(state)
    assert len(encoded.tensors) == 4
    assert all("\ud800" not in name and name != "__metadata__" for name in encoded.tensors)
    assert [found["a.b"].item(), found["a"]["b"].item(), found["__metadata__"].item()] == [0, 1, 2]


class Colour(enum.Enum):
    RED = 1


class Loudness(enum.IntEnum):
    HIGH = 1


@dataclasses.dataclass
class Point:
    x: int
    y: int


class Pair(NamedTuple):
    x: int
    y: int


class Sharded(torch.Tensor):
    device_mesh = "a mesh"


def test_a_value_that_cannot_be_stored_is_refused_with_its_place():
    for value, message in [
        (object(), r"state\['a'\]\[0\] is a builtins.object"),
        (lambda: 1, "a builtins.function"),
        (Colour.RED, "Colour"),
        (Loudness.HIGH, "the enum member"),
        (torch.nn.Linear, "builtins.type"),
        (torch.eye(3).to_sparse(), r"a sparse tensor .*to_dense\(\)"),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged), "a nested tensor"),
        (torch.empty(2, dtype=torch.bits8), "bits8, a type that the safetensors format lacks"),
        (np.ma.array([1.0, 2.0], mask=[True, False]), r"a masked array .*getmaskarray"),
        (np.zeros(2, [("x", "i4"), ("y", "f8")]), "array of type .*each field"),
        (np.array(["a"]), "array of type <U1"),
        (np.datetime64("2026-01-01", "D"), r"scalar of type datetime64\[D\]"),
        (np.float64, "builtins.type"),
        (Point(1, 2), "Point"),
        (Path("file"), "PosixPath"),
        (range(3), "builtins.range"),
        (memoryview(b"a"), "builtins.memoryview"),
        (torch.empty(3, device="meta"), "device meta"),
        (np.array([object()], object), "array of type object"),
        ({Colour.RED: 1}, "a key of type Colour"),
        ({Loudness.HIGH: 1}, "the enum member"),
        ({WithState()}, "a key of type WithState"),
        (torch.ones(2).as_subclass(Sharded), r"torch\.distributed\.checkpoint"),
        (torch.Generator(), "torch._C.Generator"),
    ]:
        with pytest.raises(TypeError, match=message) as caught:
            encode_state({"a": [value]})
        assert "state['a'][0]" in str(caught.value), message


def test_a_state_that_contains_itself_is_refused():
    state = {}
    state["self"] = state
    with pytest.raises(ValueError, match="the state is nested too deep to be stored, or contains itself"):
        encode_state(state)


@pytest.mark.parametrize(
    "make",
    [lambda value: np.full(4096, value, ">f4"), lambda value: np.full((64, 128), value, np.complex128)[:, ::2]],
    ids=["big-endian", "complex with gaps"],
)
def test_arrays_that_objects_make_for_their_state_dicts_are_not_taken_for_each_other(make):
    """The memory of a temporary array that is copied is used again for the next one."""

    class Temporary:
        def __init__(self, value):
            self.value = value

        def state_dict(self):
            return {"x": make(self.value)}

    encoded = encode_state({f"object{number}": Temporary(number) for number in range(6)})
    assert encoded.aliases == {}
    assert len(encoded.tensors) == 6


def same(left, right):
    """Whether two values are equal with their types, down to the last NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, dict):
        return [*map(repr, left)] == [*map(repr, right)] and all(map(same, left.values(), right.values()))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)


TWICE = [1, {"a": 2}]
EQUAL = {
    "expanded tensor": torch.ones(3, 1).expand(3, 4),
    "tensor without elements": torch.empty(0, 3),
    "tensor of no dimensions": torch.tensor(1.5),
    "transposed tensor": torch.arange(6.0).reshape(2, 3).t(),
    "leaf that requires grad": torch.ones(2, requires_grad=True),
    "result that requires grad": torch.ones(2, requires_grad=True) * 2,
    "conjugate view": torch.tensor([1 + 2j]).conj(),
    "negative view": torch.tensor([1 + 2j]).conj().imag,
    "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "read-only array": np.broadcast_to(np.ones(1), (4,)),
    "reversed array": np.arange(5)[::-1],
    "tuples and lists": [(1, [2, (3,)]), []],
    "sets in a set": {frozenset({1, (2, b"c")}), "a", None, 1.5},
    "frozenset": frozenset({1}),
    "keys of many types": {1: 2, "1": 3, None: 5, 2.5: 6, b"k": 7, (1, "a"): 8, frozenset({1}): 9},
    "keys of numpy": {np.int64(3): 1, np.float32(0.1): 2},
    "key that is no number": {math.nan: 1},
    "keys like tags": {"$tensor": 1, "$dict": [[1, 2]]},
    "unusual texts as keys": {key: torch.ones(2) for key in ("a/b", "a.b", "", " ", "\u00e4", "\0", "a\nb", "..")},
    "empty names below empty names": {"": {"": torch.ones(2), ".": torch.zeros(1)}},
    "numbers that are not finite": [math.nan, math.inf, -math.inf],
    "empty containers": [{}, [], (), set(), frozenset(), b"", ""],
    "array in Fortran order": np.arange(12).reshape(3, 4).T[::2],
    "array of no dimensions": np.array(2.5),
    "array without elements": np.array([], np.int8),
    "array of complex numbers": np.array([[1 + 2j, math.inf]]),
    "tensor of complex128": torch.tensor([1 + 2j], dtype=torch.complex128),
    "scalars of numpy": [np.float64(0.1), np.float32(-math.inf), np.float16(math.nan), np.int8(-3), np.bool_(True)],
    "facts of torch": [torch.bfloat16, torch.device("cuda", 1), torch.Size([2, 3])],
    "numbers that json lacks": [complex(1, math.inf), -0.0, 2**80, 2**14_279, -(2**14_279)],
    "an object that occurs twice": [TWICE, TWICE],
}


def test_a_value_comes_back_equal_and_with_its_type():
    for name, value in EQUAL.items():
        found = read_back({"x": value})["x"]
        assert same(found, value), name
    assert repr(read_back({"x": -0.0})) == "{'x': -0.0}"
    text = state_text(encode_state(EQUAL).tree)
    assert json.loads(text, parse_constant=pytest.fail)["state"], "plain JSON"


def test_a_subclass_comes_back_as_its_plain_type():
    for value, plain in [
        (torch.nn.Parameter(torch.ones(2)), torch.ones(2)),
        (np.arange(3, dtype=">i4"), np.arange(3, dtype="<i4")),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (Pair(1, 2), (1, 2)),
        (bytearray(b"a"), b"a"),
    ]:
        assert same(read_back({"x": value})["x"], plain), value


def test_a_kind_of_a_later_release_is_named():
    with pytest.raises(ValueError, match=r"unknown kind '\$new'"):
        decode_state({"x": {"$new": 1}}, None)


def test_a_text_that_is_no_state_is_refused():
    for text in [b"", b"[]", b"{}", b'{"version":2,"state":1}']:
        with pytest.raises(ValueError, match=r"expected|Expecting"):
            parse_state(text)


def test_states_of_arrays_need_no_torch():
    code = """if True:
        import sys
        sys.modules["torch"] = None
        import numpy as np
        from tiercache.checkpoint.state_tree import decode_state, encode_state
        encoded = encode_state({"x": np.ones(3), "y": [1, (2, np.float32(3))]})
        found = decode_state(encoded.tree, lambda name, library: encoded.tensors[name].value)
        assert found["y"] == [1, (2, 3.0)]
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_pickled(monkeypatch):
    refuse = collections.defaultdict(lambda: pytest.fail)
    monkeypatch.setattr("pickle.dumps", refuse[""])
    monkeypatch.setattr("pickle.loads", refuse[""])
    assert read_back({"x": [torch.ones(1), WithState()]})["x"][1]["n"] == 3
