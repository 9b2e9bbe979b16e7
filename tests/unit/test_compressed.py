"""Compressed data of each format: whole, truncated, damaged, too large."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from vmodel.compressed import decompress, format_of

TEXT = b"".join(b"line %d\n" % n for n in range(500))


def streamed(data: bytes) -> bytes:
    """zstd as of a pipe: the frame does not say how large it is."""
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return compressor.compress(data) + compressor.flush()


FORMATS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "zstd": ("zstd", zstandard.ZstdCompressor(write_checksum=True).compress),
    "zstd of a pipe": ("zstd", streamed),
    "xz": ("xz", lzma.compress),
    "gzip": ("gzip", gzip.compress),
}
EACH = pytest.mark.parametrize("name", FORMATS)


@EACH
def test_whole(name: str) -> None:
    format_, compress = FORMATS[name]
    assert format_of(compress(TEXT)) == format_
    assert decompress(compress(TEXT), len(TEXT)) == TEXT


@EACH
def test_no_more_than_asked_for(name: str) -> None:
    """Also where the data says its size: then nothing of it is decompressed."""
    compress = FORMATS[name][1]
    for most in (1, len(TEXT) - 1):
        with pytest.raises(ValueError, match=f"^has more than {most:,} bytes$"):
            decompress(compress(TEXT), most)
    with pytest.raises(ValueError, match=r"^has more than 1,048,576 bytes$"):
        decompress(compress(bytes(64 << 20)), 1 << 20)


@EACH
def test_each_truncation(name: str) -> None:
    data = FORMATS[name][1](TEXT)
    for size in range(len(data)):
        with pytest.raises(ValueError, match=r"^(ends early|cannot be decompressed: |is compressed with something)"):
            decompress(data[:size], 1 << 20)


@EACH
def test_what_is_behind_the_end(name: str) -> None:
    with pytest.raises(ValueError, match=r"^goes on behind its end$"):
        decompress(FORMATS[name][1](TEXT) + b"more", 1 << 20)


@EACH
@given(data=st.data())
def test_flipped_bits(name: str, data: st.DataObject) -> None:
    """The result is the text, as bits of a name or a time do not matter, or an error: each format has a checksum."""
    changed = bytearray(FORMATS[name][1](TEXT))
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert decompress(bytes(changed), 1 << 20) == TEXT
    except ValueError as error:
        assert "\n" not in str(error)


def test_sizes_that_no_memory_has() -> None:
    """A zstd frame that says 2**62 bytes; an xz whose dictionary would have 4 GiB."""
    frame = b"\x28\xb5\x2f\xfd\xe0" + (1 << 62).to_bytes(8, "little") + bytes(20)
    with pytest.raises(ValueError, match=r"^has more than 1,048,576 bytes$"):
        decompress(frame, 1 << 20)
    data = bytearray(lzma.compress(TEXT))
    data[12 + 4] = 40  # the dictionary's size; behind the block's header is its CRC
    size = (data[12] + 1) * 4 - 4
    data[12 + size : 12 + size + 4] = zlib.crc32(data[12 : 12 + size]).to_bytes(4, "little")
    with pytest.raises(ValueError, match=r"^cannot be decompressed: Memory usage limit exceeded$"):
        decompress(bytes(data), 1 << 20)


@pytest.mark.parametrize(
    ("data", "name"),
    [(bz2.compress(TEXT), "bzip2"), (lzma.compress(TEXT, lzma.FORMAT_ALONE), "lzma"), (TEXT, "something unknown")],
    ids=["bzip2", "lzma", "text"],
)
def test_other_formats(data: bytes, name: str) -> None:
    with pytest.raises(ValueError, match=f"^is compressed with {name}, and not with zstd, xz or gzip$"):
        decompress(data, 1 << 20)
