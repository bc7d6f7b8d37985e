"""BlockCodec: the chunks that `auto` compresses."""

import numpy as np

from tiercache.shard.codec import MEASURED_BLOCKS, BlockCodec
from tiercache.shard.schema import Kind


def blocks_of(*n_letters: int, n_bytes: int = 1 << 16) -> list[np.ndarray]:
    """A block: a column of so many random letters each; of one letter zstd leaves next to nothing."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, letters, n_bytes if letters > 1 else n_bytes // 4, np.uint8) for letters in n_letters]


def encoded(codec: BlockCodec, block: list[np.ndarray]) -> list[bool]:
    frames = codec.encode([chunk.nbytes for chunk in block], lambda number: block[number])
    return [frame is not None for frame in frames]


def test_auto_stores_a_block_raw_if_its_columns_together_save_little() -> None:
    for compression, letters, kept in (
        (["auto"], [26], [False]),  # zstd leaves 0.60 of it
        (["auto"], [4], [True]),  # 0.27
        (["auto"] * 3, [256, 256, 1], [False, False, False]),  # a ninth: not worth a frame in each block
        (["auto"] * 2, [256, 1], [False, True]),  # a fifth
        (["auto"] * 4, [256, 256, 1, 1], [False, False, True, True]),  # together a fifth
        (["zstd", "auto", "auto"], [256, 256, 1], [True, False, True]),  # frames there are anyhow
        (["auto", "auto", "zstd"], [256, 256, 1], [False, False, True]),  # somebody wants it
    ):
        codec, block = BlockCodec([(text, Kind.BYTES) for text in compression]), blocks_of(*letters)
        found = [encoded(codec, block) for _ in range(MEASURED_BLOCKS + 2)]
        assert found == [kept] * (MEASURED_BLOCKS + 2), (compression, letters)


def test_auto_stops_compressing_if_the_first_blocks_saved_little() -> None:
    codec = BlockCodec([("auto", Kind.BYTES)] * 2)
    for _ in range(MEASURED_BLOCKS):
        assert encoded(codec, blocks_of(256, 1, n_bytes=1 << 18)[:1] + blocks_of(1)) == [False, False]
    asked: list[int] = []
    codec.encode([1 << 18, 1 << 14], lambda number: asked.append(number) or blocks_of(1)[0])
    assert asked == []
