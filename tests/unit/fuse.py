"""A file whose file system is a program that may fall silent: FUSE's own protocol (Linux, uapi/linux/fuse.h)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from pathlib import Path

_HEADER = struct.Struct("<IIQQIIIi")
_GETATTR, _OPEN, _STATFS, _INIT = 3, 14, 17, 26
_FORGET, _BATCH_FORGET = 2, 42
_NODEV, _NOSUID, _MNT_FORCE, _MNT_DETACH = 4, 2, 1, 2
SIZE = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class SilentFile:
    """A file of 1 MiB at `path`, which is a regular file before and after.  Needs root and /dev/fuse: OSError.

    The program behind it never answers STATFS, and nothing at all once it is `silent`; attributes count for
    `attributes` seconds.
    """

    def __init__(self, path: Path, attributes: int) -> None:
        self._path, self._attributes = bytes(path), attributes
        self.silent = False
        path.touch()
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = b"fd=%d,rootmode=100644,user_id=0,group_id=0" % self._device
        if _libc.mount(b"silent", self._path, b"fuse", _NODEV | _NOSUID, options) < 0:
            code = ctypes.get_errno()
            os.close(self._device)
            raise OSError(code, os.strerror(code))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it: whatever waits for an answer gets an error."""
        _libc.umount2(self._path, _MNT_FORCE | _MNT_DETACH)
        self._thread.join(10)
        os.close(self._device)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._device, 1 << 18)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return  # ENODEV: unmounted
            _, opcode, unique, *_ = _HEADER.unpack_from(request)
            if self.silent or opcode in (_STATFS, _FORGET, _BATCH_FORGET):
                continue
            error, body = 0, b""
            if opcode == _INIT:
                body = struct.pack("<IIIIHHIIHHI28x", 7, 31, 0, 0, 12, 9, 1 << 16, 1, 16, 0, 0)
            elif opcode == _GETATTR:
                attribute = struct.pack(
                    "<QQQQQQIIIIIIIIII", 1, SIZE, SIZE // 512, *[0] * 6, 0o100644, 1, 0, 0, 0, 4096, 0
                )
                body = struct.pack("<QII", self._attributes, 0, 0) + attribute
            elif opcode == _OPEN:
                body = struct.pack("<QII", 1, 0, 0)
            else:
                error = -errno.ENOSYS
            os.write(self._device, struct.pack("<IiQ", 16 + len(body), error, unique) + body)
