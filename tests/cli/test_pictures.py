"""`tiercache head` with pictures: which terminal gets which bytes."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from tests.images.pictures import encode, picture

from tiercache import config
from tiercache.cli import pictures
from tiercache.pack import pack

VARIABLES = ("TERM", "TERM_PROGRAM", "TMUX", "KITTY_WINDOW_ID", "LC_TERMINAL")


@pytest.fixture
def photo():
    return picture(50, 200, seed=3)


@pytest.fixture
def data_set(photo, tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "0.png").write_bytes(encode(photo, "png"))
    pack(tmp_path / "photos", tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def on_terminal(monkeypatch):
    """Standard output counts as a terminal, whatever stands for it while the command runs."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pictures, "_is_terminal", lambda: True)


def opened(data: str | bytes) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def is_like(found: Image.Image, photo: Image.Image) -> bool:
    expected = photo.copy()
    expected.thumbnail(found.size)
    return found.size == expected.size and np.array_equal(np.asarray(found), np.asarray(expected))


def test_kitty_gets_a_png_in_chunks(tiercache, data_set, photo, on_terminal, monkeypatch):
    monkeypatch.setenv("KITTY_WINDOW_ID", "1")
    out = tiercache("head", data_set).out
    assert out.startswith("record 0\n  image  <png ")
    parts = re.findall("\x1b_G([^;]*);([^\x1b]*)\x1b\\\\", out)
    assert len(parts) > 1
    assert parts[0][0] == "a=T,f=100,q=2,m=1"
    assert [keys for keys, _ in parts[1:]] == ["m=1"] * (len(parts) - 2) + ["m=0"]
    assert all(len(data) <= 4096 for _, data in parts)
    shown = opened("".join(data for _, data in parts))
    assert shown.size == (160, 40)
    assert is_like(shown, photo)


def test_iterm2_gets_a_png_inline(tiercache, data_set, photo, on_terminal, monkeypatch):
    monkeypatch.setenv("TERM_PROGRAM", "iTerm.app")
    size, data = re.search(
        "\x1b]1337;File=inline=1;size=(\\d+):([^\x07]*)\x07", tiercache("head", data_set).out
    ).groups()
    assert len(base64.b64decode(data)) == int(size)
    assert is_like(opened(data), photo)


def test_sixel_gets_bands_of_six_rows(tiercache, data_set, photo, on_terminal, monkeypatch):
    monkeypatch.setenv("TERM", "foot")
    text = re.search('\x1bPq"1;1;160;40(.*)\x1b\\\\', tiercache("head", data_set).out, re.S)[1]
    colours = {int(n): [int(v) for v in rgb] for n, *rgb in re.findall(r"#(\d+);2;(\d+);(\d+);(\d+)", text)}
    assert 1 < len(colours) <= 64
    drawn = np.full((42, 160, 3), -1, np.int64)
    bands = re.sub(r"#\d+;2;\d+;\d+;\d+", "", text).split("-")
    assert bands.pop() == ""
    assert len(bands) == 7
    for band, lines in enumerate(bands):
        for number, line in re.findall(r"#(\d+)([?-~]*)\$", lines):
            assert len(line) == 160
            bits = np.frombuffer(line.encode(), np.uint8) - 63
            for row in range(6):
                drawn[6 * band + row, (bits >> row & 1) == 1] = colours[int(number)]
    assert (drawn[40:] == -1).all()
    expected = photo.resize((160, 40))
    assert np.abs(drawn[:40] - np.asarray(expected, np.int64) * 100 // 255).mean() < 5


def test_blocks_are_two_pixels_a_character(tiercache, data_set, photo, on_terminal):
    out = tiercache("head", data_set, "--pictures", "blocks").out
    lines = [line for line in out.splitlines() if "\u2580" in line]
    cell = re.compile("\x1b\\[38;2;(\\d+);(\\d+);(\\d+)m\x1b\\[48;2;(\\d+);(\\d+);(\\d+)m\u2580")
    pixels = np.array([[[int(v) for v in found] for found in cell.findall(line)] for line in lines])
    assert pixels.shape == (5, 40, 6)
    small = photo.copy()
    small.thumbnail((40, 40))
    rows = pixels.reshape(5, 40, 2, 3).transpose(0, 2, 1, 3).reshape(10, 40, 3)
    assert np.array_equal(rows, np.asarray(small))
    assert all(line.endswith("\x1b[0m") for line in lines)


def test_an_odd_last_row_is_drawn_over_black(photo):
    text = pictures.picture(encode(photo.resize((3, 3)), "png"), "blocks")
    assert text.count("\n") == 1
    assert text.splitlines()[1].count("\x1b[48;2;0;0;0m") == 3


@pytest.mark.parametrize("choice", ["auto", "kitty", "blocks"])
def test_nothing_is_drawn_where_standard_output_is_no_terminal(tiercache, data_set, monkeypatch, choice):
    monkeypatch.setenv("KITTY_WINDOW_ID", "1")
    assert "\x1b" not in tiercache("head", data_set, "--pictures", choice).out


def test_pictures_can_be_turned_off_and_json_has_none(tiercache, data_set, on_terminal, monkeypatch):
    monkeypatch.setenv("KITTY_WINDOW_ID", "1")
    assert "\x1b" not in tiercache("head", data_set, "--pictures", "none").out
    assert tiercache("head", data_set, "--json").events[-1]["shown"] == 1
    assert "\x1b" not in tiercache("head", data_set, "--json").out


def test_an_unknown_protocol_is_an_error(tiercache, data_set):
    assert "--pictures is auto, kitty" in tiercache("head", data_set, "--pictures", "braille", code=2).err


def test_an_image_that_cannot_be_decoded_is_shown_as_its_size(on_terminal):
    assert pictures.picture(b"\xff\xd8\xff no image", "kitty") == ""


def test_without_the_libraries_records_are_shown_as_text(tiercache, data_set, on_terminal, monkeypatch):
    monkeypatch.setenv("KITTY_WINDOW_ID", "1")

    def missing(*_):
        raise ModuleNotFoundError("simplejpeg")

    monkeypatch.setattr(pictures, "thumbnail", missing)
    out = tiercache("head", data_set).out
    assert "\x1b" not in out
    assert "<png " in out


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "foot-direct"}, "sixel"),
        ({"TERM": "mlterm"}, "sixel"),
        ({"TERM": "footing"}, None),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "screen", "LC_TERMINAL": "iTerm2"}, None),
        ({"TMUX": "/tmp/tmux", "TERM": "xterm-kitty"}, None),
    ],
)
def test_a_terminal_tells_its_protocol_in_the_environment(monkeypatch, variables, expected):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert config.terminal_pictures() == expected
