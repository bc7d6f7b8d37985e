"""pack --resize and --encode: the images are those of torchvision and Pillow, and what needs no change is kept."""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from tests.support.pictures import encode, picture
from torchvision.transforms import Resize

import tiercache as tc
from tiercache.errors import SchemaError
from tiercache.packer.pack import pack


def write(folder, images):
    folder.mkdir()
    for name, data in images.items():
        (folder / name).write_bytes(data)
    return folder


def packed(tmp_path, images, **options):
    """Return the stored bytes by file name."""
    pack(write(tmp_path / "in", images), tmp_path / "out", **options)
    return {one["path"]: bytes(one["image"]) for one in tc.Dataset(tmp_path / "out")}


def opened(data):
    return Image.open(io.BytesIO(data))


def differ(one, other):
    return np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))


class TestResize:
    @pytest.mark.parametrize("size", [(375, 500), (500, 375), (300, 300), (1000, 64)])
    def test_the_pixels_and_the_size_are_those_of_torchvision(self, tmp_path, size):
        image = picture(*size)
        stored = packed(tmp_path, {"a.png": encode(image, "png")}, resize=50)["a.png"]
        assert opened(stored).format == "PNG"
        expected = Resize(50)(image)
        assert opened(stored).size == expected.size
        assert differ(opened(stored), expected).max() <= 1

    def test_an_image_of_the_size_or_smaller_is_kept_byte_for_byte(self, tmp_path):
        exif = Image.Exif()
        exif[274] = 6
        images = {
            "a.jpg": encode(picture(60, 200), exif=exif),
            "b.png": encode(picture(20, 20), "png"),
            "c.webp": encode(picture(60, 70), "webp"),
            "d.gif": encode(picture(60, 70).quantize(), "gif"),
        }
        assert packed(tmp_path, images, resize=60) == images

    def test_each_keeps_its_encoding_and_what_is_not_written_becomes_png(self, tmp_path):
        images = {f"a.{name}": encode(picture(90, 70), name) for name in ("jpeg", "png", "webp", "bmp", "tiff", "gif")}
        found = packed(tmp_path, images, resize=64)
        formats = {path: opened(data).format for path, data in found.items()}
        assert formats == {
            "a.jpeg": "JPEG", "a.png": "PNG", "a.webp": "WEBP", "a.bmp": "PNG", "a.tiff": "PNG", "a.gif": "PNG",
        }  # fmt: skip
        assert {opened(data).size for data in found.values()} == {(64, 82)}

    def test_a_large_jpeg_is_close_to_what_pillow_makes_of_it(self, tmp_path):
        data = encode(picture(375, 500))
        found = opened(packed(tmp_path, {"a.jpg": data}, resize=128, encode="jpeg:95")["a.jpg"])
        assert differ(found, Resize(128)(opened(data))).mean() < 1


class TestEncode:
    def test_the_column_has_the_encoding_and_images_in_it_are_kept(self, tmp_path):
        images = {"a.jpg": encode(picture(60, 80), quality=30), "b.png": encode(picture(60, 80, 1), "png")}
        found = packed(tmp_path, images, encode="jpeg:92")
        assert found["a.jpg"] == images["a.jpg"]
        assert found["b.png"] == encode(opened(images["b.png"]), quality=92)
        assert str(tc.Dataset(tmp_path / "out").schema.columns[0]) == "image<jpeg>"

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_applied_to_what_is_encoded_anew(self, tmp_path, orientation):
        exif = Image.Exif()
        exif[274] = orientation
        data = encode(picture(40, 60), exif=exif)
        found = opened(packed(tmp_path, {"a.jpg": data}, encode="png")["a.jpg"])
        assert not found.getexif()
        assert differ(found, ImageOps.exif_transpose(opened(data))).max() == 0

    def test_grey_values_alpha_and_16_bits_stay_where_the_encoding_has_them(self, tmp_path):
        grey = picture(60, 80).convert("L")
        alpha = picture(60, 80).copy()
        alpha.putalpha(grey)
        deep = Image.fromarray(np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) * 13)
        images = {
            "alpha.png": encode(alpha, "png"),
            "bit.png": encode(grey.convert("1"), "png"),
            "deep.png": encode(deep, "png"),
            "grey.png": encode(grey, "png"),
            "index.png": encode(picture(60, 80).quantize(), "png"),
            "cmyk.jpg": encode(picture(60, 80).convert("CMYK")),
        }
        source = write(tmp_path / "in", images)
        modes = {}
        for how in ("jpeg", "png", "webp"):
            pack(source, tmp_path / how, encode=how, resize=30)
            stored = {one["path"]: opened(bytes(one["image"])) for one in tc.Dataset(tmp_path / how)}
            modes[how] = {path.partition(".")[0]: image.mode for path, image in stored.items()}
            if how == "png":
                assert differ(stored["alpha.png"], Resize(30)(alpha)).max() <= 1
                wide = Image.fromarray(np.asarray(deep).astype(np.float32)).resize((40, 30), Image.Resampling.BILINEAR)
                assert differ(stored["deep.png"], wide).max() <= 1
            if how == "jpeg":
                shallow = Image.fromarray((np.asarray(deep) >> 8).astype(np.uint8))
                assert differ(stored["deep.png"], Resize(30)(shallow)).mean() < 4
        rgb = {"index": "RGB", "cmyk": "RGB"}
        assert modes["jpeg"] == {"alpha": "RGB", "bit": "L", "deep": "L", "grey": "L", **rgb}
        assert modes["png"] == {"alpha": "RGBA", "bit": "L", "deep": "I;16", "grey": "L", **rgb}
        assert modes["webp"] == {"alpha": "RGBA", "bit": "RGB", "deep": "RGB", "grey": "RGB", **rgb}

    def test_a_colour_profile_stays_with_its_colours(self, tmp_path):
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        images = {
            "a.png": encode(picture(60, 80), "png", icc_profile=profile),
            "b.png": encode(picture(60, 80).convert("L"), "png", icc_profile=profile),
        }
        found = packed(tmp_path, images, encode="webp:90")
        assert opened(found["a.png"]).info["icc_profile"] == profile
        (tmp_path / "more").mkdir()
        found = packed(tmp_path / "more", images, encode="jpeg")
        assert opened(found["a.png"]).info["icc_profile"] == profile
        assert "icc_profile" not in opened(found["b.png"]).info


def test_bad_images_are_in_the_report_and_any_number_of_workers_writes_the_same(tmp_path):
    images = {f"{i:03}.png": encode(picture(70, 80, i), "png") for i in range(30)}
    images["007.png"] = images["007.png"][:60] + b"damage" * 20 + images["007.png"][180:]
    write(tmp_path / "in", images)
    options = {"encode": "jpeg", "resize": 64, "on_error": "skip", "shard_size": 20_000, "block_size": 4000}
    stored = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        with pytest.warns(UserWarning, match="1 bad records were not packed"):
            pack(tmp_path / "in", out, workers=workers, **options)
        (line,) = map(json.loads, (tmp_path / f"out{workers}.bad.jsonl").read_text().splitlines())
        assert line["location"].endswith("007.png")
        assert line["reason"].startswith("an image cannot be decoded: ")
        stored.append([bytes(one["image"]) for one in tc.Dataset(out)])
    assert len(stored[0]) == 29
    assert stored[0] == stored[1]
    with pytest.raises(SchemaError, match=r"007.png: an image cannot be decoded"):
        pack(tmp_path / "in", tmp_path / "stop", encode="jpeg")


def test_other_encodings_are_appended_if_they_are_encoded_as_the_data_set(tmp_path):
    folder = write(tmp_path / "one", {})
    for name in ("cat", "dog"):
        write(folder / name, {"a.png": encode(picture(40, 50), "png")})
    pack(folder, tmp_path / "out", encode="jpeg")
    (tmp_path / "two").mkdir()
    write(tmp_path / "two" / "dog", {"b.webp": encode(picture(40, 50), "webp")})
    pack(tmp_path / "two", tmp_path / "out", mode="append", encode="jpeg")
    found = list(tc.Dataset(tmp_path / "out"))
    assert [one["label"] for one in found] == [0, 1, 1]
    assert {opened(bytes(one["image"])).format for one in found} == {"JPEG"}
    with pytest.raises(SchemaError, match="image"):
        pack(tmp_path / "two", tmp_path / "out", mode="append", encode="png")


def test_images_of_tables_and_nulls_are_changed_by_the_command(tmp_path, tiercache):
    with tc.Writer(tmp_path / "in", schema={"x": "int64", "photo": tc.Image(nullable=True)}) as writer:
        writer.write({"x": 1, "photo": encode(picture(90, 80), "png")})
        writer.write({"x": 2, "photo": None})
    tiercache("export", tmp_path / "in", tmp_path / "in.parquet")
    flags = "--column", "photo=image?", "--resize", "40", "--encode", "webp:70"
    tiercache("pack", tmp_path / "in.parquet", tmp_path / "out", *flags)
    first, second = tc.Dataset(tmp_path / "out")
    assert (opened(bytes(first["photo"])).size, second["photo"]) == ((40, 45), None)
    same = pack(tc.Dataset(tmp_path / "in"), tmp_path / "object", resize=40)
    assert same.n_records == 2


def test_wrong_options_say_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"encode must be jpeg, png or webp; .*, got 'jpeg:101'"):
        pack(tmp_path, tmp_path / "out", encode="jpeg:101")
    with pytest.raises(ValueError, match="encode must be"):
        pack(tmp_path, tmp_path / "out", encode="png:9")
    with pytest.raises(ValueError, match="resize must be a number of pixels, got 0"):
        pack(tmp_path, tmp_path / "out", resize=0)
    with pytest.raises(SchemaError, match=r"change columns of images, .* none among x: int64"):
        pack([{"x": 1}], tmp_path / "out", resize=10)
