import numpy as np
import numpy.typing as npt

_Numbers = npt.NDArray[np.uint64]

class Decoder:
    """A zstd context and the functions that use it. For one thread at a time.

    Args:
        create, destroy, decode, promise: addresses of ZSTD_createDCtx, ZSTD_freeDCtx, ZSTD_decompressDCtx and
            ZSTD_getFrameContentSize of one library, which stays loaded.
    """

    def __init__(self, create: int, destroy: int, decode: int, promise: int) -> None: ...
    def decode(self, frames: _Numbers, stored: _Numbers, out: _Numbers, raw: _Numbers) -> int:
        """Decode frame i, stored[i] bytes at address frames[i], to raw[i] bytes at out[i]; the GIL is dropped once.

        All uint64[n]. The addresses are trusted. Returns how many were right: n, or the number of the first frame that
        does not hold exactly raw[i] bytes.
        """
