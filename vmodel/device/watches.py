"""Fds of the host that a model watches: a thread waits for them, and the device's thread runs the calls."""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Callable

from vmodel.errors import DmaFault, GuestError
from vmodel.logs import limited
from vmodel.threads import place

log = limited(__name__)

#: Seconds that the thread gets to end, as a device's own does.
STOP_TIMEOUT = 1.0
#: Most fds that a device may watch at a time.
MOST = 32


class Watch:
    """A watched fd.  Any thread may cancel it."""

    def __init__(self, watches: Watches, fd: int, call: Callable[[], None]) -> None:
        self._watches = watches
        self.fd = fd
        self.call = call

    def cancel(self) -> None:
        """Ends the watch: `call` does not begin any more, unless another thread has just begun it."""
        self._watches.drop(self)


class Watches:
    """The watched fds of one device."""

    def __init__(
        self, name: str, post: Callable[[Callable[[], None]], None], failed: Callable[[str, BaseException], None]
    ) -> None:
        """`name` is the device's; `post` runs a call on its thread; `failed` gets exceptions of calls."""
        self._name, self._post, self._failed = name, post, failed
        self._lock = threading.Lock()
        #: By our own duplicate of the fd: one that its owner closes is never mistaken for another file.
        self._watched: dict[int, Watch] = {}
        self._epoll: select.epoll | None = None
        self._end = -1
        self._thread: threading.Thread | None = None

    def add(self, fd: int, call: Callable[[], None]) -> Watch:
        """Watches an fd.  OSError: EPERM, it is a regular file, which is always readable; ENOSPC, too many."""
        with self._lock:
            if len(self._watched) >= MOST:
                raise OSError(errno.ENOSPC, f"more than {MOST} fds are watched")
            if self._epoll is None:
                self._start()
            assert self._epoll is not None
            own = os.dup(fd)
            try:
                self._epoll.register(own, select.EPOLLIN | select.EPOLLONESHOT)
            except OSError as error:
                os.close(own)
                if error.errno == errno.EPERM:
                    raise OSError(errno.EPERM, "a regular file or folder is always readable: read it instead") from None
                raise
            watch = self._watched[own] = Watch(self, own, call)
            return watch

    def _start(self) -> None:
        epoll, end = select.epoll(), os.eventfd(0, os.EFD_CLOEXEC)
        epoll.register(end, select.EPOLLIN)
        thread = threading.Thread(target=self._main, args=(epoll, end), name="vmodel-watch", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the host allows no more threads
            epoll.close()
            os.close(end)
            raise
        self._epoll, self._end, self._thread = epoll, end, thread

    def drop(self, watch: Watch) -> None:
        """Ends a watch."""
        with self._lock:
            if self._watched.get(watch.fd) is watch:
                del self._watched[watch.fd]
                if self._epoll is not None:
                    self._epoll.unregister(watch.fd)
                os.close(watch.fd)

    def close(self) -> None:
        """Ends all watches and the thread.  If that does not end within STOP_TIMEOUT, the log says where it is."""
        for watch in list(self._watched.values()):
            self.drop(watch)
        if self._thread is not None and self._epoll is not None:
            os.eventfd_write(self._end, 1)
            self._thread.join(STOP_TIMEOUT)
            if self._thread.is_alive():  # it keeps what it waits for
                where = place(self._thread.ident)
                log.error("%s: the thread that watches its fds does not end, it is in %s", self._name, where)
            else:
                self._epoll.close()
                os.close(self._end)
            self._thread = self._epoll = None

    def _main(self, epoll: select.epoll, end: int) -> None:
        while True:
            for fd, _ in epoll.poll():
                if fd == end:
                    return
                with self._lock:
                    watch = self._watched.get(fd)
                if watch is not None:
                    self._post(lambda watch=watch: self._run(watch))  # type: ignore[misc]

    def _run(self, watch: Watch) -> None:
        """Runs a call, and watches the fd again: until then it is not looked at, so calls of one fd never overlap."""
        if self._watched.get(watch.fd) is not watch:
            return
        try:
            if _is_ready(watch.fd):  # else the event was of an earlier watch, whose number this one got
                watch.call()
        except (GuestError, DmaFault) as error:
            self._failed("a watch", error)
        except BaseException as error:
            self._failed("a watch, which has ended with this", error)
            self.drop(watch)
        with self._lock:
            if self._watched.get(watch.fd) is watch and self._epoll is not None:
                self._epoll.modify(watch.fd, select.EPOLLIN | select.EPOLLONESHOT)


def _is_ready(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
