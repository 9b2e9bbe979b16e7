"""`GuestCoverage`: which of a guest's kernel code has run, of the modules and functions that are asked for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmodel.closing import Closing
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.kernel_image import KernelImage
from vmodel.coverage.program import Program
from vmodel.coverage.recorder import Recorder, plugin
from vmodel.coverage.target import Target
from vmodel.guest.artifacts import Kernel, Qemu
from vmodel.guest.debug_symbols import KERNEL, find_debug
from vmodel.guest.kernel_code import check_module
from vmodel.guest.modules import find_module, load_module

#: The first QEMU whose plugins have the API version that ours is written for.
_LEAST_QEMU = (11, 1)


def check_emulator(qemu: Qemu, accelerator: str) -> None:
    """CoverageError: this QEMU, or accelerator, does not tell what runs; or vmodel was installed without its plugin."""
    if accelerator != "tcg":
        raise CoverageError("coverage needs TCG, as QEMU does not see what runs under KVM: unset VMODEL_ACCEL")
    if qemu.version < _LEAST_QEMU:
        have, need = (".".join(map(str, version)) for version in (qemu.version, _LEAST_QEMU))
        raise CoverageError(f"coverage needs QEMU {need} or newer, not {have}: ./scripts/get-qemu fetches one")
    plugin()


class GuestCoverage(Closing):
    """Records what runs from QEMU's start to its end.  One thread at a time."""

    def __init__(
        self, targets: Sequence[str], qemu: Qemu, kernel: Kernel, own: Mapping[str, Path], accelerator: str
    ) -> None:
        """`targets`: as of `Target.parse`; `own`: the files of modules by name that are not the kernel's.

        CoverageError: there is no such code, or this QEMU or accelerator does not tell what runs.
        """
        check_emulator(qemu, accelerator)
        wanted = dict.fromkeys(map(Target.parse, targets))
        image = KernelImage.load(kernel.image)
        self._programs = [self._program(target, kernel, own) for target in wanted]
        self.recorder = Recorder(image, kernel_too=any(target.kernel for target in wanted))
        #: After `close`.
        self._last: Coverage | CoverageError | None = None

    def _program(self, target: Target, kernel: Kernel, own: Mapping[str, Path]) -> Program:
        if target.kernel:
            return _of_kernel(kernel.image, *_version(kernel.image), target.prefix, find_debug(kernel, KERNEL))
        if (path := target.file or own.get(target.name)) is not None:
            return _of_file(target.name, path, *_version(path), None)
        if (path := find_module(kernel, target.name)) is not None:
            return _of_file(target.name, path, *_version(path), find_debug(kernel, target.name))
        check_module(target.name, kernel, own)  # says why
        raise CoverageError(f"kernel {kernel.release} has no module {target.name!r}")

    def clear(self) -> None:
        """Clears what ran so far."""
        self.recorder.clear()

    @property
    def nearly_full(self) -> bool:
        """Whether there is not much place left: a module that is loaded again takes new place."""
        return self.recorder.used > 0.75

    def taken(self) -> Coverage:
        """What ran since the last `clear`; of a guest that has ended: up to its end.

        CoverageError: more ran than there was place to record.
        """
        if isinstance(self._last, CoverageError):
            raise self._last
        if self._last is not None:
            return self._last
        if self.recorder.lost:
            raise CoverageError(f"coverage is incomplete: {self.recorder.lost} blocks of code found no place")
        executed = self.recorder.executed()
        found = []
        for program in self._programs:
            ranges: list[tuple[int, int]] = []
            for part in executed:
                if part.module is None:
                    ranges += part.ranges if program.name.startswith("vmlinux:") else ()
                elif part.module.name == program.name:
                    text, init = part.module.text[0], part.module.init[0] if part.module.init[1] else None
                    ranges += program.text.ranges_of(text, init, part.ranges)
            found.append(Coverage.of_ranges(program, ranges))
        return Coverage.union(found)

    def close(self) -> None:
        """Frees the memory; `taken` has the last state from then on."""
        if self._last is not None:
            return
        try:
            self._last = self.taken()
        except CoverageError as error:
            self._last = error
        self.recorder.close()


def _version(path: Path) -> tuple[int, int]:
    """What changes when a file does.  CoverageError: it cannot be read."""
    try:
        state = path.stat()
    except OSError as error:
        raise CoverageError(f"cannot be read: {error.strerror}", file=path) from None
    return state.st_mtime_ns, state.st_size


# Guests of one process mostly have the same modules, and taking their code apart takes a second.
@functools.lru_cache(maxsize=64)
def _of_file(name: str, path: Path, modified: int, size: int, debug: Path | None) -> Program:
    return Program.of_module(name, load_module(path), debug, path)


@functools.lru_cache(maxsize=16)
def _of_kernel(image: Path, modified: int, size: int, prefix: str, debug: Path | None) -> Program:
    return Program.of_kernel(KernelImage.load(image), [prefix], debug)
