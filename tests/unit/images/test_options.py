"""DecodeImage: what it takes, and what it says of what it does not."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

import tiercache as tc

WRONG = [
    (ValueError, {"size": 0}, "size must be 1 pixel or more, got 0"),
    (TypeError, {"size": 2.5}, "size must be a whole number of pixels, got 2.5"),
    (TypeError, {"size": (3, "4")}, "size must be a whole number of pixels, got '4'"),
    (ValueError, {"size": (1, 2, 3)}, "size is an int, .* got"),
    (ValueError, {"size": "22"}, "size is an int, .* got '22'"),
    (ValueError, {"size": 8, "crop": "middle"}, "crop must be one of 'center', 'random', got 'middle'"),
    (ValueError, {"size": 8, "dtype": "int64"}, "dtype must be one of 'uint8', .* got 'int64'"),
    (ValueError, {"size": 8, "layout": "NCHW"}, "layout must be one of 'CHW', 'HWC'"),
    (ValueError, {"size": 8, "dct": "float"}, "dct must be one of 'accurate', 'fast', got 'float'"),
    (TypeError, {"size": 8, "flip": 0.5}, "flip is True or False, got 0.5"),
    (ValueError, {"size": 8, "resize": 7}, "resize must be 8 or more"),
    (ValueError, {"size": (8, 12), "resize": 10}, "resize must be 12 or more"),
    (ValueError, {"size": 8, "resize": 9, "crop": "random"}, "resize=9 applies only to crop='center'"),
    (ValueError, {"size": None, "resize": 9}, "size=None returns whole images"),
    (ValueError, {"size": None, "crop": "random"}, "crop='random' needs a size"),
    (ValueError, {"size": 8, "scale": (0, 1)}, "scale is a pair"),
    (ValueError, {"size": 8, "scale": (0.5, 2)}, "at most 1"),
    (ValueError, {"size": 8, "ratio": (2, 1)}, "ratio is a pair"),
    (ValueError, {"size": 8, "ratio": 3}, "ratio is a pair"),
    (ValueError, {"size": 8, "brightness": -0.1}, "brightness is a number 0 or more, or a pair.*got -0.1"),
    (ValueError, {"size": 8, "contrast": (1.2, 0.8)}, r"smallest <= largest <= 8, got \(1.2, 0.8\)"),
    (ValueError, {"size": 8, "saturation": (0.5, 8.5)}, "largest <= 8"),
    (ValueError, {"size": 8, "saturation": 7.5}, "largest <= 8, got 7.5"),
    (ValueError, {"size": 8, "brightness": True}, "brightness is a number"),
    (ValueError, {"size": 8, "brightness": "0.4"}, "brightness is a number or a pair"),
    (ValueError, {"size": 8, "brightness": float("nan")}, "brightness is a number"),
    (ValueError, {"size": 8, "mean": 0.5, "dtype": "float32"}, "mean and std go together, got mean=0.5, std=None"),
    (ValueError, {"size": 8, "mean": 0.5, "std": 0.5}, "mean and std need a float dtype"),
    (ValueError, {"size": 8, "mean": (0.5, 0.5), "std": 1, "dtype": "float32"}, "mean is a number, or three"),
    (ValueError, {"size": 8, "mean": 123.7, "std": 58.4, "dtype": "float32"}, "mean is of values 0 to 1.*got 123.7"),
    (ValueError, {"size": 8, "mean": 0, "std": (1, 0, 1), "dtype": "float32"}, "std must be greater than 0"),
    (ValueError, {"size": 8, "mean": 0, "std": 1e-5, "dtype": "float16"}, "100000, which float16 cannot hold"),
    (TypeError, {"size": 8, "apply_exif_orientation": 6}, "apply_exif_orientation is True or False, got 6"),
]


def test_a_wrong_argument_is_an_error_that_names_it_and_its_values():
    for error, given, message in WRONG:
        with pytest.raises(error, match=message):
            tc.DecodeImage(**given)


def test_options_that_mean_the_same_are_equal():
    given = tc.DecodeImage(np.int64(8), dtype=torch.float16, scale=[0.5, 1])
    assert given == tc.DecodeImage((8, 8), dtype="float16", scale=(0.5, 1.0))
    assert pickle.loads(pickle.dumps(given)) == given
    assert hash(given) == hash(pickle.loads(pickle.dumps(given)))
    normal = tc.DecodeImage(8, dtype="float16", brightness=np.float32(0.5), contrast=2, mean=0.5, std=[0.2, 0.2, 0.2])
    pairs = {"brightness": (0.5, 1.5), "contrast": (0, 3)}
    assert normal == tc.DecodeImage(8, dtype="float16", **pairs, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert hash(normal) == hash(pickle.loads(pickle.dumps(normal)))


def test_options_with_a_size_know_the_shape_of_results():
    assert tc.DecodeImage((8, 12)).batch_shape == (3, 8, 12)
    assert tc.DecodeImage((8, 12), layout="HWC").batch_shape == (8, 12, 3)
    assert tc.DecodeImage((8, 12), layout="channels_last").batch_shape == (3, 8, 12)
    with pytest.raises(ValueError, match="no common shape"):
        _ = tc.DecodeImage(None).shape


def test_options_need_no_decoding_library():
    code = "import sys, tiercache as tc; tc.DecodeImage(8); print({'cv2', 'PIL', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
