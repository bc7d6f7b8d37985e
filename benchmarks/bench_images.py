"""JPEG 500x375 to 224: image decoders alone, and the loader with the selected decoder, interleaved in one process.

    python benchmarks/bench_images.py [--threads 1 2] [--repetitions 5] [--min-s 0.5] [--images 512] [--brief] [--quick]

On a busy machine, `chrt -f 10 python benchmarks/bench_images.py --brief` (as root) has the processors almost to itself.

The baseline for each number of threads is the selected decoder and resize alone: simplejpeg decodes into a buffer of
the thread, and OpenCV resizes the centre square into another one, with as many threads as the loader has. The loader's
rows are shuffled epochs with `dtype="uint8"` and `layout="CHW"`; every batch is taken and dropped.

    python benchmarks/bench_images.py --augmented [--threads 1 2] [--quick]

The vision loop: random resized crop, flip, colour jitter, normalisation to float16. The baseline is tiercache's decoder
with its crop and resize, without the other transforms and without a loader; the second row adds the transforms.

    python benchmarks/bench_images.py --places [--repetitions 15]

Effect of the alignment of the memory that pictures of several sizes are decoded into before they are resized.

    python benchmarks/bench_images.py --resizes [--repetitions 15]

Difference of resized photographs (scikit-learn's, 427x427, as JPEGs of quality 90) to those of torchvision with
antialias=True, and what decoding and resizing costs, beside OpenCV's linear resize of the whole decoded picture.
"""

from __future__ import annotations

import argparse
import io
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import tiercache as tc
from generate import generate
from rows import OUT, spread, table, write_rows
from stages.turns import Case, Effort, in_turns, tables
from tiercache.images.decode_image import Dct, ImageDraws
from tiercache.images.decoder import Decoder, stored_dtype
from workloads import DECODED_SIZE, IMAGE_HEIGHT, IMAGE_WIDTH, IMAGES, JITTER, KEY, MEAN, STD

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Decode = Callable[[bytes], object]

SIZE = (DECODED_SIZE, DECODED_SIZE)
RESIZED = (350, 292, 256, 214, 160, 128, 107, 96, 64, 32)
PLACED = ((375, 500), (256, 256), (384, 512), (480, 640))
# Copies of each picture in an epoch, so that the start of threads and memory counts as little as in a long epoch.
COPIES = 4
_own = threading.local()


def _memory() -> tuple[np.ndarray, np.ndarray]:
    """Return the calling thread's memory for a whole picture and for the result."""
    if not hasattr(_own, "memory"):
        _own.memory = np.empty(4 << 20, np.uint8), np.empty((*SIZE, 3), np.uint8)
    return _own.memory


def _centre(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[top : top + side, left : left + side]


def by_simplejpeg(data: bytes) -> np.ndarray:
    """Decode a whole picture."""
    return simplejpeg.decode_jpeg(data, buffer=_memory()[0])


def by_simplejpeg_fast_dct(data: bytes) -> np.ndarray:
    """Decode a whole picture with the faster and less exact transform: `DecodeImage(dct="fast")`."""
    return simplejpeg.decode_jpeg(data, fastdct=True, buffer=_memory()[0])


def by_simplejpeg_fast(data: bytes) -> np.ndarray:
    """Decode a whole picture with the faster and less exact transform and upsampling."""
    return simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True, buffer=_memory()[0])


def by_simplejpeg_five_eighths(data: bytes) -> np.ndarray:
    """Decode at the smallest of libjpeg's scales that covers the result."""
    return simplejpeg.decode_jpeg(data, min_height=DECODED_SIZE, min_width=DECODED_SIZE, buffer=_memory()[0])


def by_simplejpeg_half(data: bytes) -> np.ndarray:
    """Decode at half the size, as `DecodeImage(dct="fast")` does if the result is not larger than that."""
    # simplejpeg uses the smallest scale that covers both lengths: with lengths of 1 that would be an eighth.
    height, width = -(-IMAGE_HEIGHT // 2), -(-IMAGE_WIDTH // 2)
    return simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=2, buffer=_memory()[0])


def chosen(data: bytes) -> None:
    """Decode, and resize the centre square: the loader's work without layout and delivery."""
    cv2.resize(_centre(by_simplejpeg(data)), SIZE, _memory()[1], interpolation=cv2.INTER_LINEAR)


def chosen_by_area(data: bytes) -> None:
    """The same with OpenCV's averaging resize."""
    cv2.resize(_centre(by_simplejpeg(data)), SIZE, _memory()[1], interpolation=cv2.INTER_AREA)


def by_opencv(data: bytes) -> np.ndarray:
    """Decode a whole picture with OpenCV."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def by_opencv_resized(data: bytes) -> None:
    """OpenCV's decoder and resize."""
    cv2.resize(_centre(by_opencv(data)), SIZE, _memory()[1], interpolation=cv2.INTER_LINEAR)


def by_pillow_resized(data: bytes) -> np.ndarray:
    """Pillow with its draft mode, which decodes at the smallest of libjpeg's scales that covers the result."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", SIZE)
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        return np.asarray(image.resize(SIZE, Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)))


def _torchvision() -> dict[str, Decode]:
    """Return torchvision's decoder, alone and with its resize; nothing if torchvision is not installed."""
    try:
        io_, functional = import_module("torchvision.io"), import_module("torchvision.transforms.v2.functional")
    except ModuleNotFoundError:
        return {}

    def decoded(data: bytes) -> Any:
        return io_.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def resized(data: bytes) -> Any:
        picture = decoded(data)
        return functional.resize(functional.center_crop(picture, [min(picture.shape[1:])]), list(SIZE), antialias=False)

    return {"torchvision, decode": decoded, "torchvision": resized}


def _decoders() -> dict[str, Decode]:
    return {
        "simplejpeg, decode": by_simplejpeg,
        "simplejpeg, decode, fast DCT": by_simplejpeg_fast_dct,
        "simplejpeg, decode, fast": by_simplejpeg_fast,
        "simplejpeg, decode to 5/8": by_simplejpeg_five_eighths,
        "simplejpeg, decode to 1/2": by_simplejpeg_half,
        "simplejpeg + OpenCV area": chosen_by_area,
        "OpenCV, decode": by_opencv,
        "OpenCV": by_opencv_resized,
        **_torchvision(),
        "Pillow": by_pillow_resized,
    }


def _cases(
    pictures: Sequence[bytes], path: Path, n_threads: int, pool: ThreadPoolExecutor, others: Mapping[str, Decode]
) -> list[Case]:
    """Return the cases for a number of threads: the selected decoder, the loader with its crops, other decoders."""
    stage, baseline = f"{n_threads} threads" if n_threads > 1 else "1 thread", "simplejpeg + OpenCV linear"
    shares = [pictures[k::n_threads] for k in range(n_threads)]

    def alone(decode: Decode) -> Callable[[], object]:
        return lambda: list(pool.map(lambda share: [decode(data) for data in share] and None, shares))

    def epochs(**how: Any) -> Callable[[], object]:
        dataset = tc.Dataset(path, decode={"image": tc.DecodeImage(DECODED_SIZE, **how)})
        options = tc.LoaderOptions(seed=1, threads=n_threads)
        loader = tc.DataLoader(dataset, batch_size=IMAGES.batch_size, shuffle=True, options=options)
        return lambda: sum(len(batch[KEY]) for batch in loader)

    n, unit = len(pictures), "images/s"
    ways = [{"crop": "center"}, {"crop": "random"}]
    loaders = [
        Case(
            stage,
            ", ".join(["loader", *(f"{k}={v}" for k, v in how.items())]),
            epochs(**how),
            COPIES * n,
            unit,
            baseline,
        )
        for how in ways
    ]
    rest = [Case(stage, name, alone(decode), n, unit, baseline) for name, decode in others.items()]
    return [Case(stage, baseline, alone(chosen), n, unit), *loaders, *rest]


def _augmented_cases(pictures: Sequence[bytes], path: Path, n_threads: int, pool: ThreadPoolExecutor) -> list[Case]:
    """Return the cases of the vision loop: the decoder alone, with all transforms, and the loader by layout."""
    crop: dict[str, Any] = {"crop": "random", "flip": True}
    whole = {**crop, **dict.fromkeys(("brightness", "contrast", "saturation"), JITTER)}
    whole |= {"dtype": "float16", "mean": MEAN, "std": STD}
    stage = f"{n_threads} threads" if n_threads > 1 else "1 thread"
    bare, full = "decoder, crop and resize alone", "decoder and transforms alone"
    options = {bare: tc.DecodeImage(DECODED_SIZE, layout="HWC", **crop), full: tc.DecodeImage(DECODED_SIZE, **whole)}
    shares = [range(k, len(pictures), n_threads) for k in range(n_threads)]

    def alone(name: str) -> Callable[[], object]:
        how = options[name]
        draws = ImageDraws(1, 0, [how]).of(np.arange(len(pictures)))
        own = threading.local()

        def decode(share: range) -> None:
            if not hasattr(own, "decoder"):
                own.decoder = Decoder(how)
                own.memory = np.empty(how.memory_shape(*how.shape), stored_dtype(how.dtype))
            for number in share:
                own.decoder.decode_into(pictures[number], draws[number], own.memory)

        return lambda: list(pool.map(decode, shares))

    def epochs(**how: Any) -> Callable[[], object]:
        dataset = tc.Dataset(path, decode={"image": tc.DecodeImage(DECODED_SIZE, **how)})
        loader_options = tc.LoaderOptions(seed=1, threads=n_threads)
        loader = tc.DataLoader(dataset, batch_size=IMAGES.batch_size, shuffle=True, options=loader_options)
        return lambda: sum(len(batch[KEY]) for batch in loader)

    n, unit = len(pictures), "images/s"
    cases = [Case(stage, bare, alone(bare), n, unit), Case(stage, full, alone(full), n, unit, bare)]
    cases.append(Case(stage, "loader, crop and resize", epochs(**crop), COPIES * n, unit, bare))
    for layout in ("CHW", "channels_last"):
        name = f"loader, all transforms, layout={layout}"
        cases.append(Case(stage, name, epochs(**whole, layout=layout), COPIES * n, unit, bare))
    return cases


def _in_turns(cases: Sequence[Case], effort: Effort) -> list[dict[str, Any]]:
    """Like in_turns, with processor_us in the rows: processor time per picture, less disturbed by a busy machine."""
    spent: dict[str, list[float]] = {case.name: [] for case in cases}

    def watched(case: Case) -> Case:
        def run() -> None:
            start_s = time.process_time()
            case.run()
            spent[case.name].append((time.process_time() - start_s) / case.amount * 1e6)

        return replace(case, run=run)

    rows = in_turns([watched(case) for case in cases], effort)
    return [{**row, "processor_us": spread(spent[row["case"]])} for row in rows]


def _processor_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of processor time per picture, minimum and median, and of the speed relative to the first row."""
    first = rows[0]["processor_us"]
    lines = []
    for row in rows:
        took = row["processor_us"]
        speeds = [f"{first[key] / took[key]:.2f}" for key in ("min", "median")]
        lines.append([row["case"], f"{took['min']:.0f}", f"{took['median']:.0f}", *speeds])
    return table(("processor time", "us, min", "us, median", "speed, min", "speed, median"), lines)


def _place_table(repetitions: int) -> str:
    """Return a table of the minimum decode and resize time, into memory at a multiple of 32 and 16 bytes after it."""
    rng, lines = np.random.default_rng(13), []
    for height, width in PLACED:
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + rng.integers(-12, 13, smooth.shape, np.int16)).clip(0, 255).astype(np.uint8)
        data, memory = simplejpeg.encode_jpeg(noisy, 90, "RGB", "420"), np.empty(noisy.nbytes + 64, np.uint8)
        first, took = -memory.ctypes.data % 32, {0: float("inf"), 16: float("inf")}
        for _ in range(repetitions):
            for beyond in took:
                place = memory[first + beyond :][: noisy.nbytes]
                start_s = time.thread_time()
                for _ in range(50):
                    picture = simplejpeg.decode_jpeg(data, buffer=place)
                    cv2.resize(picture, SIZE, _memory()[1], interpolation=cv2.INTER_LINEAR)
                took[beyond] = min(took[beyond], (time.thread_time() - start_s) / 50 * 1e6)
        lines.append([f"{width}x{height}", *(f"{us:.0f}" for us in took.values())])
    return table(("picture", "on a multiple of 32, us", "16 beyond, us"), lines)


def _resize_table(repetitions: int) -> str:
    """Return a table of resizes of squares: difference to torchvision, and time to decode and resize."""
    functional, lines = import_module("torchvision.transforms.v2.functional"), []
    photographs = [simplejpeg.encode_jpeg(np.ascontiguousarray(_centre(p)), 90) for p in load_sample_images().images]
    for side in RESIZED:
        linear: Decode = partial(_by_opencv_to, side=side)
        decoders = [Decoder(tc.DecodeImage(side, layout="HWC", dct=dct)) for dct in get_args(Dct)]
        ways = [linear, *(partial(decoder.decode, draws=()) for decoder in decoders)]
        whole = [torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1) for data in photographs]
        resized = [functional.resize(picture, [side], antialias=True) for picture in whole]
        expected = [picture.permute(1, 2, 0).numpy() for picture in resized]
        took = [float("inf")] * len(ways)
        for _ in range(repetitions):
            for number, way in enumerate(ways):
                start_s = time.thread_time()
                for data in photographs * 5:
                    way(data)
                took[number] = min(took[number], (time.thread_time() - start_s) / 5 / len(photographs) * 1e6)
        cells = []
        for way, us in zip(ways, took, strict=True):
            found = [np.abs(way(data) - e.astype(int)) for data, e in zip(photographs, expected, strict=True)]
            cells += [" / ".join(f"{difference.mean():.2f}" for difference in found), f"{us:.0f}"]
        lines.append([f"427 -> {side}", f"{427 / side:.2f}", *cells])
    heads = [f"{way}, {what}" for way in ("linear", "accurate", "fast") for what in ("difference", "us")]
    return table(("side", "factor", *heads), lines)


def _by_opencv_to(data: bytes, *, side: int) -> np.ndarray:
    return cv2.resize(by_simplejpeg(data), (side, side), interpolation=cv2.INTER_LINEAR)


def _pack(folder: Path, n_images: int) -> tuple[list[bytes], Path]:
    """Return the pictures and the path of a data set of them."""
    source = generate(replace(IMAGES, n_records=n_images), folder / f"pictures-{n_images}")
    path = folder / "dataset"
    shutil.rmtree(path, ignore_errors=True)
    pictures = source.batch(0, n_images)["image"]
    with tc.Writer(path, schema={"image": tc.Image("jpeg"), KEY: "int64"}) as writer:
        for _ in range(COPIES):
            writer.write_batch({"image": pictures, KEY: np.arange(n_images)})
    return pictures, path


def main(given: list[str] | None = None) -> None:
    """Run the cases, print the tables, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--min-s", type=float, default=0.5, help="Seconds of a repetition.")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--brief", action="store_true", help="Only the selected decoder and the loader.")
    parser.add_argument("--folder", type=Path, default=OUT / "images", help="Folder for data and rows.")
    parser.add_argument("--quick", action="store_true", help="Smoke test: little data, and no meaningful figures.")
    parser.add_argument("--augmented", action="store_true", help="Only the vision loop with all transforms.")
    parser.add_argument("--places", action="store_true", help="Only measure the alignment of decoded pictures.")
    parser.add_argument("--resizes", action="store_true", help="Only compare resizes with those of torchvision.")
    asked = parser.parse_args(given)
    effort = Effort(1, 0.0) if asked.quick else Effort(asked.repetitions, asked.min_s)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    if asked.places or asked.resizes:
        tabulate = _place_table if asked.places else _resize_table
        print(tabulate(1 if asked.quick else asked.repetitions))
        return
    asked.folder.mkdir(parents=True, exist_ok=True)
    pictures, path = _pack(asked.folder, 32 if asked.quick else asked.images)
    others = {} if asked.brief or asked.augmented else _decoders()
    rows: list[dict[str, Any]] = []
    for n_threads in asked.threads:
        with ThreadPoolExecutor(n_threads) as pool:
            if asked.augmented:
                cases = _augmented_cases(pictures, path, n_threads, pool)
            else:
                cases = _cases(pictures, path, n_threads, pool, others)
            found = _in_turns(cases, effort)
        print(f"{tables(found)}\n\n{_processor_table(found)}\n", flush=True)
        rows += found
    place = asked.folder / ("augmented.jsonl" if asked.augmented else "images.jsonl")
    write_rows(place, rows)
    print(f"rows: {place}")


if __name__ == "__main__":
    main()
