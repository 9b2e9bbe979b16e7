"""Get Log Page (NVMe 1.4, 5.14): builds each page by its identifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from construct import Array, Bytes, BytesInteger, Const, Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct

from vmodel.devices.nvme.command import BROADCAST, NvmeCommand
from vmodel.devices.nvme.health import ERROR_ENTRIES, TEMPERATURE
from vmodel.devices.nvme.identify import LIST_ENTRIES, build, id_list
from vmodel.devices.nvme.status import CommandError, NvmeStatus

if TYPE_CHECKING:
    from vmodel.devices.nvme.controller import Nvme

_Int128ul = BytesInteger(16, swapped=True)

#: Figure 193.
ErrorInformation = Struct(
    "error_count" / Int64ul,
    "sqid" / Int16ul,
    "cid" / Int16ul,
    "status" / Int16ul,  # with the phase tag's place in bit 0
    "location" / Int16ul,
    "lba" / Int64ul,
    "nsid" / Int32ul,
    "vendor" / Int8ul,
    "transport" / Int8ul,
    Padding(2),
    "command_specific" / Int64ul,
    "transport_specific" / Int16ul,
    Padding(22),
)
assert ErrorInformation.sizeof() == 64

#: Figure 194.
Smart = Struct(
    "critical_warning" / Int8ul,
    "temperature" / Int16ul,  # in kelvin
    "available_spare" / Int8ul,
    "spare_threshold" / Int8ul,
    "percentage_used" / Int8ul,
    "endurance_group" / Int8ul,
    Padding(25),
    "data_units_read" / _Int128ul,  # 32, in thousands of 512 bytes
    "data_units_written" / _Int128ul,
    "host_reads" / _Int128ul,  # 64
    "host_writes" / _Int128ul,
    "busy_minutes" / _Int128ul,  # 96
    "power_cycles" / _Int128ul,
    "power_on_hours" / _Int128ul,  # 128
    "unsafe_shutdowns" / _Int128ul,
    "media_errors" / _Int128ul,  # 160
    "error_entries" / _Int128ul,
    "warning_minutes" / Int32ul,  # 192
    "critical_minutes" / Int32ul,
    "sensors" / Array(8, Int16ul),
    Padding(296),
)
assert Smart.sizeof() == 512

#: Figure 196.
FirmwareSlots = Struct("active" / Int8ul, Padding(7), "revisions" / Array(7, Bytes(8)), Padding(448))
assert FirmwareSlots.sizeof() == 512

#: Figure 198.
CommandEffects = Struct("admin" / Array(256, Int32ul), "io" / Array(256, Int32ul), Padding(2048))
assert CommandEffects.sizeof() == 4096

#: Figure 200, and its results, figure 201.
SelfTestResult = Struct(
    "status" / Int8ul,
    "segment" / Int8ul,
    "valid" / Int8ul,
    Padding(1),
    "power_on_hours" / Int64ul,
    "nsid" / Int32ul,
    "lba" / Int64ul,
    "status_type" / Int8ul,
    "status_code" / Int8ul,
    Padding(2),
)
SelfTest = Struct("operation" / Int8ul, "completion" / Int8ul, Const(bytes(2)), "results" / Array(20, SelfTestResult))
assert SelfTestResult.sizeof() == 28 and SelfTest.sizeof() == 564

#: Figure 240.
SanitizeStatus = Struct(
    "progress" / Int16ul,
    "status" / Int16ul,
    "cdw10" / Int32ul,
    "overwrite_seconds" / Int32ul,
    "block_erase_seconds" / Int32ul,
    "crypto_erase_seconds" / Int32ul,
    "overwrite_no_deallocate_seconds" / Int32ul,
    "block_erase_no_deallocate_seconds" / Int32ul,
    "crypto_erase_no_deallocate_seconds" / Int32ul,
    Padding(480),
)
assert SanitizeStatus.sizeof() == 512

#: Effects (figure 199): the command is supported; changes blocks, a namespace's capabilities, or the inventory; must be
#: submitted while no other command to the namespace, or to any namespace, is outstanding.  No command changes the
#: controller's capabilities: CAP and Identify do not depend on firmware or features.
SUPPORTED, BLOCKS, NAMESPACE, INVENTORY, ALONE, ALL_ALONE = 1, 2, 4, 8, 1 << 16, 2 << 16
#: I/O commands that change blocks: Write, Write Uncorrectable, Write Zeroes, Dataset Management, Copy.
_WRITING = {0x01, 0x04, 0x08, 0x09, 0x19}

#: Most entries of the changed namespace list; with more namespaces its only entry is FFFFFFFFh.
_CHANGED = LIST_ENTRIES


class Logs:
    """The log pages of a controller."""

    def __init__(self, controller: Nvme) -> None:
        self._controller = controller
        #: Namespaces that have changed since the host read page 4.
        self.changed: set[int] = set()
        self._pages: dict[int, Callable[[NvmeCommand], bytes]] = {
            0x01: self._errors,
            0x02: self._smart,
            0x03: self._firmware,
            0x04: self._changed_namespaces,
            0x05: self._effects,
            0x06: self._self_test,
            0x81: self._sanitize,
        }

    def page(self, command: NvmeCommand) -> tuple[bytes, int, Callable[[], None]]:
        """Carries out Get Log Page: (the requested part, its requested size, what to call after the transfer).

        The part is shorter than requested at the end of the page.  CommandError.
        """
        identifier, retain = command.cdw10 & 0xFF, bool(command.cdw10 & 1 << 15)
        size = ((command.cdw11 & 0xFFFF) << 16 | command.cdw10 >> 16) + 1 << 2
        offset = command.cdw13 << 32 | command.cdw12
        build_page = self._pages.get(identifier)
        if build_page is None:
            raise CommandError(NvmeStatus.INVALID_LOG_PAGE, location=40)
        if offset & 3:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=48)
        if command.nsid not in (0, BROADCAST):  # no page has data of one namespace; for SMART, LPA says so (5.14.1)
            raise CommandError(NvmeStatus.INVALID_FIELD, location=4)
        whole = build_page(command)
        if offset > len(whole):
            raise CommandError(NvmeStatus.INVALID_FIELD, location=48)
        return whole[offset : offset + size], size, lambda: self._read(identifier, retain)

    def _read(self, identifier: int, retain: bool) -> None:
        """After the transfer of a page: unless the host retains events, their types are unmasked."""
        if not retain:
            if identifier == 0x04:
                self.changed.clear()
            self._controller.events.read(identifier)

    def _errors(self, command: NvmeCommand) -> bytes:
        entries = [
            build(
                ErrorInformation,
                {
                    "error_count": entry.count,
                    "sqid": entry.sqid,
                    "cid": entry.cid,
                    "status": entry.status << 1,
                    "location": entry.location,
                    "lba": entry.lba,
                    "nsid": entry.nsid,
                    "command_specific": entry.information,
                },
            )
            for entry in self._controller.health.errors
        ]
        return b"".join(entries).ljust(64 * ERROR_ENTRIES, b"\0")

    def _smart(self, command: NvmeCommand) -> bytes:
        health, features = self._controller.health, self._controller.features
        fields = {
            "critical_warning": features.temperature_warning << 1,
            "temperature": TEMPERATURE,
            "available_spare": 100,
            "spare_threshold": 10,
            "data_units_read": -(-health.bytes_read // 512_000),
            "data_units_written": -(-health.bytes_written // 512_000),
            "host_reads": health.reads,
            "host_writes": health.writes,
            "busy_minutes": self._controller.backend.busy_ns // 60_000_000_000,
            "power_cycles": health.power_cycles,
            "power_on_hours": health.power_on_hours,
            "unsafe_shutdowns": health.unsafe_shutdowns,
            "media_errors": health.media_errors,
            "error_entries": health.error_count,
            "sensors": [TEMPERATURE] + [0] * 7,
        }
        return build(Smart, fields)

    def _firmware(self, command: NvmeCommand) -> bytes:
        firmware = self._controller.firmware
        slots = [
            firmware.slots.get(slot, "").encode().ljust(8, b"\0" if slot not in firmware.slots else b" ")
            for slot in range(1, 8)
        ]
        return build(FirmwareSlots, {"active": firmware.pending << 4 | firmware.active, "revisions": slots})

    def _changed_namespaces(self, command: NvmeCommand) -> bytes:
        return id_list(self.changed if len(self.changed) <= _CHANGED else [BROADCAST])

    def _effects(self, command: NvmeCommand) -> bytes:
        if command.cdw14 >> 24:  # a command set other than NVM
            raise CommandError(NvmeStatus.INVALID_FIELD, location=59)
        admin = self._controller.admin.effects
        io = {n: SUPPORTED | (BLOCKS if n in _WRITING else 0) for n in self._controller.io.opcodes}
        return build(
            CommandEffects,
            {
                "admin": [admin.get(n, 0) for n in range(256)],
                "io": [io.get(n, 0) for n in range(256)],
            },
        )

    def _self_test(self, command: NvmeCommand) -> bytes:
        return self._controller.self_test.log()

    def _sanitize(self, command: NvmeCommand) -> bytes:
        return self._controller.sanitize.log()
