"""Decoding of many zstd frames in one call without the GIL, by a libzstd that the caller has found."""

import numpy as np
import numpy.typing as npt

_Numbers = npt.NDArray[np.uint64]

class ZstdDecoder:
    """A zstd context and the functions that use it. Only one thread may use it at a time.

    Args:
        create: Address of ZSTD_createDCtx of a libzstd that stays loaded.
        destroy: Address of ZSTD_freeDCtx of the same library.
        decode: Address of ZSTD_decompressDCtx of the same library.
        content_size: Address of ZSTD_getFrameContentSize of the same library.
    """

    def __init__(self, create: int, destroy: int, decode: int, content_size: int) -> None: ...
    def decode(self, frames: _Numbers, stored: _Numbers, out: _Numbers, raw: _Numbers) -> int:
        """Decode frame i, stored[i] bytes at address frames[i], to raw[i] bytes at address out[i].

        The GIL is released once. All arguments are uint64[n], and the addresses are trusted.

        Returns:
            Number of decoded frames: n, or the index of the first frame that does not decode to exactly raw[i] bytes.
        """
