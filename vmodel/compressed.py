"""Compressed data: zstd, xz and gzip, whichever it is by its first bytes; of a size that is bounded."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable

import zstandard

#: Memory that xz may take for its dictionary, in bytes; Linux's own files need 128 MiB at most.
_XZ_MEMORY = 256 << 20
#: The largest window of zstd, in bytes: zstd -22 makes such.
_ZSTD_WINDOW = 1 << 27
#: Bytes of zstd at a time: they have 128 MiB at most (4 bytes are a block of 128 KiB).
_ZSTD_PIECE = 4096


def _zstd(data: bytes, most: int) -> bytes:
    said = zstandard.get_frame_parameters(data).content_size
    if said > most and said != zstandard.CONTENTSIZE_UNKNOWN:
        raise ValueError(f"has more than {most:,} bytes")
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
    found, size, at = [], 0, 0
    while at < len(data) and size <= most and not decompressor.eof:
        found.append(decompressor.decompress(data[at : at + _ZSTD_PIECE]))
        size += len(found[-1])
        at += _ZSTD_PIECE
    return _whole(b"".join(found), most, decompressor.eof, decompressor.unused_data + data[at:])


def _xz(data: bytes, most: int) -> bytes:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    return _whole(decompressor.decompress(data, most + 1), most, decompressor.eof, decompressor.unused_data)


def _gzip(data: bytes, most: int) -> bytes:
    decompressor = zlib.decompressobj(16 + zlib.MAX_WBITS)
    return _whole(decompressor.decompress(data, most + 1), most, decompressor.eof, decompressor.unused_data)


def _whole(result: bytes, most: int, ended: bool, rest: bytes) -> bytes:
    if len(result) > most:
        raise ValueError(f"has more than {most:,} bytes")
    if not ended:
        raise ValueError("ends early")
    if rest:
        raise ValueError("goes on behind its end")
    return result


#: By the first bytes: the format's name, and its function; None for those that are only named.
_FORMATS: dict[bytes, tuple[str, Callable[[bytes, int], bytes] | None]] = {
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
    b"\xfd7zXZ\0": ("xz", _xz),
    b"\x1f\x8b": ("gzip", _gzip),
    b"\x02\x21\x4c\x18": ("lz4", None),
    b"\x04\x22\x4d\x18": ("lz4", None),
    b"\x89LZO": ("lzo", None),
    b"BZh": ("bzip2", None),
    b"\x5d\0\0": ("lzma", None),
}


def format_of(data: bytes) -> str:
    """The name of the compression, as zstd or lz4; "" of one that is unknown."""
    return next((name for start, (name, _) in _FORMATS.items() if data.startswith(start)), "")


def decompress(data: bytes, most: int) -> bytes:
    """The data that this is the compressed form of, one whole frame, of at most `most` bytes.

    ValueError, with a text that begins with a verb: it is damaged, larger, or not compressed with zstd, xz or gzip.
    """
    function = next((function for start, (_, function) in _FORMATS.items() if data.startswith(start)), None)
    if function is None:
        raise ValueError(f"is compressed with {format_of(data) or 'something unknown'}, and not with zstd, xz or gzip")
    try:
        return function(data, most)
    except (zstandard.ZstdError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"cannot be decompressed: {error}") from None
