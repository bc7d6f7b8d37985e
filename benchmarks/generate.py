"""Generation of the records of a workload: random, and the same every time."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from images import decode
from source import GRID, PIECE_BYTES, Source, cells
from workloads import IMAGE_HEIGHT, IMAGE_WIDTH, KEY, Field, Workload

if TYPE_CHECKING:
    from pathlib import Path


def generate(workload: Workload, folder: Path) -> Source:
    """Write the columns and their expected checksums to a folder, unless they exist."""
    done, text = folder / "done", json.dumps(workload.as_json())
    if not (done.exists() and done.read_text() == text):
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(11)
        np.arange(workload.n_records, dtype=np.int64).tofile(folder / KEY)
        for field in workload.fields:
            expected = _write_images(workload, field, folder) if field.kind == "jpeg" else None
            if expected is None:
                expected = _write_words(workload, field, folder, rng)
            np.save(folder / f"{field.name}.expected.npy", expected)
        done.write_text(text)
    return Source(workload, folder)


def _write_words(workload: Workload, field: Field, folder: Path, rng: np.random.Generator) -> np.ndarray:
    """Write random words in records of one length, or of 0.2 to 1.8 times the mean. Return the sum of each record."""
    word, n = field.word, workload.n_records
    n_words = np.full(n, field.n_bytes // word.itemsize)
    if field.kind == "bytes":
        n_words = rng.integers(n_words // 5, n_words * 9 // 5 + 1, n)
    ends = np.concatenate([[0], np.cumsum(n_words)])
    sums = np.empty(n, word)
    step = max(PIECE_BYTES // field.n_bytes, 1)
    with (folder / field.name).open("wb") as file:
        for start in range(0, n, step):
            stop = min(start + step, n)
            words = _random_words(field, int(ends[stop] - ends[start]), rng)
            sums[start:stop] = np.add.reduceat(words, ends[start:stop] - ends[start], dtype=word)
            file.write(words.data)
    if field.kind != "array":
        (ends * word.itemsize).astype(np.int64).tofile(folder / f"{field.name}.offsets")
    return sums


def _random_words(field: Field, n: int, rng: np.random.Generator) -> np.ndarray:
    if field.kind == "text":
        return rng.integers(ord("a"), ord("z") + 1, n * field.word.itemsize, np.uint8).view(field.word)
    if field.dtype == "float32":
        return rng.standard_normal(n * field.word.itemsize // 4, np.float32).view(field.word)
    return rng.integers(0, 256, n * field.word.itemsize, np.uint8).view(field.word)


def _write_images(workload: Workload, field: Field, folder: Path) -> np.ndarray:
    """Write JPEGs of smooth random colours with noise, all different. Return the cells of each."""
    rng = np.random.default_rng(13)
    expected = np.empty((workload.n_records, GRID, GRID, 3), np.float32)
    ends = [0]
    with (folder / field.name).open("wb") as file:
        for i in range(workload.n_records):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
            smooth = np.asarray(coarse.resize((IMAGE_WIDTH, IMAGE_HEIGHT), Image.Resampling.BICUBIC), np.int16)
            noisy = smooth + rng.integers(-12, 13, smooth.shape, np.int16)
            stream = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "jpeg", quality=90)
            ends.append(ends[-1] + file.write(stream.getvalue()))
            expected[i] = cells(decode(stream.getvalue())[None])[0]
    np.asarray(ends, np.int64).tofile(folder / f"{field.name}.offsets")
    return expected
