"""The benchmark of decoding runs, and shows the loader beside the decoder alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.images.pictures import has_turbojpeg

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.stress
def test_the_loader_is_measured_beside_the_decoder_alone(tmp_path, warm_python):
    command = ["bench_images.py", "--quick", "--threads", "2", "--folder", str(tmp_path)]
    done = warm_python.run(command, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    loaders = [row for row in rows if row["case"].startswith("loader")]
    assert [row["case"] for row in loaders][:2] == ["loader, crop=center", "loader, crop=random"]
    assert [row["case"] for row in loaders if "resize_in=ycbcr" in row["case"]] == [row["case"] for row in loaders[2:]]
    assert len(loaders) == (5 if has_turbojpeg() else 2)
    assert all(row["of_baseline"] > 0 for row in loaders)


@pytest.mark.stress
def test_the_vision_loop_is_measured_beside_the_decoder_and_the_transforms_alone(tmp_path, warm_python):
    command = ["bench_images.py", "--augmented", "--quick", "--threads", "2", "--folder", str(tmp_path)]
    done = warm_python.run(command, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "augmented.jsonl").read_text().splitlines()]
    assert [row["case"].split(",")[0] for row in rows] == ["decoder", "decoder and transforms alone", *["loader"] * 3]
    assert all(row["of_baseline"] > 0 for row in rows[1:])


def test_alignments_of_scratch_memory_are_measured_for_each_size(tmp_path, warm_python):
    command = ["bench_images.py", "--places", "--quick", "--folder", str(tmp_path)]
    done = warm_python.run(command, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if "x" in line.split(" ")[0]]
    assert [line[0] for line in lines] == ["500x375", "256x256", "512x384", "640x480"]
    assert all(float(us) > 0 for line in lines for us in line[1:])
