"""The ETags that S3 makes of bytes, however these come."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from tiercache.store.s3 import PartsEtag, is_md5_of


def plain(data: bytes, part_bytes: int) -> str:
    """As the guide of S3 words it."""
    parts = [data[start : start + part_bytes] for start in range(0, len(data), part_bytes)]
    return f"{hashlib.md5(b''.join(hashlib.md5(part).digest() for part in parts)).hexdigest()}-{len(parts)}"


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 50))
def test_parts_are_cut_by_their_length_and_not_as_bytes_come(pieces, part_bytes):
    etag = PartsEtag(part_bytes)
    for piece in pieces:
        etag.add(piece)
    assert etag.matches(f'"{plain(b"".join(pieces), part_bytes)}"')


@given(st.binary(min_size=1, max_size=100), st.integers(1, 50), st.integers(min_value=0))
def test_a_byte_that_is_another_does_not_match(data, part_bytes, place):
    etag = PartsEtag(part_bytes)
    wrong = bytearray(data)
    wrong[place % len(data)] ^= 1
    etag.add(wrong)
    assert not etag.matches(plain(data, part_bytes))


def test_an_etag_of_one_request_is_the_md5_of_its_body():
    text = hashlib.md5(b"body").hexdigest()
    said = [is_md5_of(etag, b"body") for etag in (f'"{text}"', text, f"{text}-1", '"0"', None)]
    assert said == [True, True, False, False, False]


def test_no_etag_matches_nothing():
    etag = PartsEtag(8)
    etag.add(b"bytes")
    assert not etag.matches(None)
