"""Get and Set Features (NVMe 1.4, 5.13 and 5.21): the table of supported features, and their values."""

from __future__ import annotations

import enum
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmodel.devices.nvme.command import BROADCAST, NvmeCommand
from vmodel.devices.nvme.events import AsyncEvent
from vmodel.devices.nvme.health import TEMPERATURE, WARNING_TEMPERATURE
from vmodel.devices.nvme.namespace import Protection
from vmodel.devices.nvme.status import CommandError, NvmeStatus

if TYPE_CHECKING:
    from vmodel.devices.nvme.controller import Nvme


class FeatureId(enum.IntEnum):
    """Feature identifiers (figure 275)."""

    ARBITRATION = 0x01
    POWER_MANAGEMENT = 0x02
    TEMPERATURE_THRESHOLD = 0x04
    ERROR_RECOVERY = 0x05
    VOLATILE_WRITE_CACHE = 0x06
    NUMBER_OF_QUEUES = 0x07
    INTERRUPT_COALESCING = 0x08
    INTERRUPT_VECTOR = 0x09
    WRITE_ATOMICITY = 0x0A
    ASYNCHRONOUS_EVENTS = 0x0B
    TIMESTAMP = 0x0E
    KEEP_ALIVE = 0x0F
    SANITIZE = 0x17
    SOFTWARE_PROGRESS = 0x80
    HOST_IDENTIFIER = 0x81
    WRITE_PROTECTION = 0x84


class Select(enum.IntEnum):
    """SEL: the value that Get Features returns."""

    CURRENT = 0
    DEFAULT = 1
    SAVED = 2
    SUPPORTED = 3


@dataclass(frozen=True)
class NvmeFeature:
    """A row of the table; `bits`: the defined bits of Dword 11, all others must be 0."""

    bits: int = 0
    default: int = 0
    saveable: bool = False
    per_namespace: bool = False


_TABLE = {
    FeatureId.ARBITRATION: NvmeFeature(0xFFFF_FF07, default=7, saveable=True),
    FeatureId.POWER_MANAGEMENT: NvmeFeature(0xFF),
    FeatureId.TEMPERATURE_THRESHOLD: NvmeFeature(0x3F_FFFF, saveable=True),
    FeatureId.ERROR_RECOVERY: NvmeFeature(0x1_FFFF, per_namespace=True),
    FeatureId.VOLATILE_WRITE_CACHE: NvmeFeature(1, default=1, saveable=True),
    FeatureId.NUMBER_OF_QUEUES: NvmeFeature(0xFFFF_FFFF),
    FeatureId.INTERRUPT_COALESCING: NvmeFeature(0xFFFF, saveable=True),
    FeatureId.INTERRUPT_VECTOR: NvmeFeature(0x1_FFFF),
    FeatureId.WRITE_ATOMICITY: NvmeFeature(1),
    FeatureId.ASYNCHRONOUS_EVENTS: NvmeFeature(0xFFFF_FFFF),
    FeatureId.TIMESTAMP: NvmeFeature(),
    FeatureId.KEEP_ALIVE: NvmeFeature(0xFFFF_FFFF),
    FeatureId.SANITIZE: NvmeFeature(1),
    FeatureId.SOFTWARE_PROGRESS: NvmeFeature(0xFF, saveable=True),
    FeatureId.HOST_IDENTIFIER: NvmeFeature(1),
    FeatureId.WRITE_PROTECTION: NvmeFeature(7, per_namespace=True),
}

#: Host Identifier: 128 bits.
_EXTENDED = 1
_OVER, _UNDER = 0, 1
_ALL_SENSORS, _COMPOSITE = 15, 0
#: Asynchronous events that can be enabled: the critical warning by temperature, and the notices in OAES.
_TEMPERATURE_EVENT = 1 << 1
_SMART_EVENTS, _NOTICES = 0x1F, 0x300

#: The key of a value: a feature, and the vector, sensor's threshold or namespace that it is for, if any.
_Key = tuple[FeatureId, int]


class Features:
    """The values of one controller."""

    def __init__(self, controller: Nvme) -> None:
        self._controller = controller
        self._saved: dict[_Key, int] = {}
        self._current: dict[_Key, int] = {}
        #: Milliseconds since 1970 minus those of time.monotonic(), and their origin: 0 a reset, 1 the host.
        self._clock = 0.0
        self._clock_origin = 0
        self._host_identifier = bytes(16)
        self._setters: dict[FeatureId, Callable[[NvmeCommand, bytes], int | None]] = {
            FeatureId.POWER_MANAGEMENT: self._set_power,
            FeatureId.ERROR_RECOVERY: self._set_recovery,
            FeatureId.NUMBER_OF_QUEUES: self._set_queues,
            FeatureId.INTERRUPT_VECTOR: self._set_vector,
            FeatureId.ASYNCHRONOUS_EVENTS: self._set_events,
            FeatureId.TIMESTAMP: self._set_timestamp,
            FeatureId.KEEP_ALIVE: self._set_keep_alive,
            FeatureId.HOST_IDENTIFIER: self._set_host_identifier,
            FeatureId.WRITE_PROTECTION: self._set_protection,
        }

    def reset(self) -> None:
        """At a controller reset: saved values become current."""
        self._current = dict(self._saved)
        self._clock, self._clock_origin = -time.monotonic() * 1000, 0
        self._host_identifier = bytes(16)

    # ---- for the controller ----------------------------------------------------------------

    def value(self, feature: FeatureId, index: int = 0) -> int:
        """The current value of a feature, as in Dword 11; `index`: the vector or the namespace."""
        return self._current.get((feature, index), self._default(feature, index))

    @property
    def burst(self) -> int:
        """Arbitration Burst as a power of two; 7: no limit."""
        return self.value(FeatureId.ARBITRATION) & 7

    @property
    def weights(self) -> tuple[int, int, int]:
        """Commands of the high, medium and low priority class in a round of weighted arbitration."""
        value = self.value(FeatureId.ARBITRATION)
        return (value >> 24) + 1, (value >> 16 & 0xFF) + 1, (value >> 8 & 0xFF) + 1

    def coalescing(self, vector: int) -> tuple[int, float]:
        """(completions, seconds) to coalesce before a vector is raised; (1, 0): no coalescing."""
        value = self.value(FeatureId.INTERRUPT_COALESCING)
        if not vector or not value & 0xFF00 or not value & 0xFF:  # never of the admin queue's vector
            return 1, 0.0
        if self.value(FeatureId.INTERRUPT_VECTOR, vector) & 1 << 16:
            return 1, 0.0
        return (value & 0xFF) + 1, (value >> 8) * 100e-6

    @property
    def write_cache(self) -> bool:
        """Whether written data need not be durable before a Flush."""
        return bool(self.value(FeatureId.VOLATILE_WRITE_CACHE))

    @property
    def temperature_warning(self) -> bool:
        """Whether the composite temperature is beyond a threshold."""
        over = self.value(FeatureId.TEMPERATURE_THRESHOLD, _OVER << 4)
        under = self.value(FeatureId.TEMPERATURE_THRESHOLD, _UNDER << 4)
        return not under < TEMPERATURE < over

    def notices(self, event: AsyncEvent) -> bool:
        """Whether the host has enabled an event's notices."""
        bit = {AsyncEvent.NAMESPACE_CHANGED: 8, AsyncEvent.FIRMWARE_ACTIVATION: 9}[event]
        return bool(self.value(FeatureId.ASYNCHRONOUS_EVENTS) >> bit & 1)

    # ---- the commands ----------------------------------------------------------------------

    def data_size(self, command: NvmeCommand) -> int:
        """Bytes of data that a Set Features command transfers."""
        feature = command.cdw10 & 0xFF
        if feature == FeatureId.TIMESTAMP:
            return 8
        if feature == FeatureId.HOST_IDENTIFIER:
            return 16 if command.cdw11 & _EXTENDED else 8
        return 0

    def get(self, command: NvmeCommand) -> tuple[int, bytes]:
        """Carries out Get Features; returns (Dword 0 of the completion, data to transfer).  CommandError."""
        row, key = self._find(command)
        feature, index = key
        select = command.cdw10 >> 8 & 7
        if select > Select.SUPPORTED:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=41)
        if select == Select.SUPPORTED:
            # Bit 0: can be saved, 1: of a namespace, 2: can be changed.
            return int(row.saveable) | row.per_namespace << 1 | 1 << 2, b""
        if feature is FeatureId.TIMESTAMP:
            return 0, self._timestamp()
        if feature is FeatureId.HOST_IDENTIFIER:
            return command.cdw11 & _EXTENDED, self._host_identifier[: self.data_size(command)]
        if feature is FeatureId.NUMBER_OF_QUEUES:
            return self._queues(), b""
        if select == Select.DEFAULT:
            return self._default(*key), b""
        if select == Select.SAVED:
            return self._saved.get(key, self._default(*key)), b""
        if feature is FeatureId.WRITE_PROTECTION:
            return self._controller.inventory.attached(index).protection, b""
        return self.value(feature, index), b""

    def set(self, command: NvmeCommand, data: bytes) -> int:
        """Carries out Set Features; returns Dword 0 of the completion.  CommandError."""
        row, key = self._find(command)
        feature, _ = key
        save = bool(command.cdw10 >> 31)
        if save and not row.saveable:
            raise CommandError(NvmeStatus.FEATURE_NOT_SAVEABLE, location=43 | 7 << 8)
        if not row.per_namespace and command.nsid not in (0, BROADCAST):
            self._controller.inventory.check(command.nsid)
            raise CommandError(NvmeStatus.FEATURE_NOT_NAMESPACE_SPECIFIC, location=4)
        if command.cdw11 & ~row.bits:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=44)
        setter = self._setters.get(feature)
        result = setter(command, data) if setter else None
        keys = self._keys(key, command)
        for one in keys:
            self._current[one] = self._stored(one, command.cdw11)
            if save:
                self._saved[one] = self._current[one]
        if feature in (FeatureId.TEMPERATURE_THRESHOLD, FeatureId.ASYNCHRONOUS_EVENTS):
            self.report_temperature()
        elif feature is FeatureId.ARBITRATION:
            self._controller.arbitrate()
        return result or 0

    def report_temperature(self) -> None:
        """Reports an event if the temperature is beyond a threshold and the host has enabled that event."""
        wanted = self.value(FeatureId.ASYNCHRONOUS_EVENTS) & _TEMPERATURE_EVENT
        if wanted and self.temperature_warning:
            self._controller.events.report(AsyncEvent.TEMPERATURE)

    # ---- keys and defaults -----------------------------------------------------------------

    def _find(self, command: NvmeCommand) -> tuple[NvmeFeature, _Key]:
        """The table's row and the key of the value that a command addresses.  CommandError."""
        try:
            feature = FeatureId(command.cdw10 & 0xFF)
        except ValueError:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=40) from None
        row = _TABLE[feature]
        index = 0
        if feature is FeatureId.INTERRUPT_VECTOR:
            index = command.cdw11 & 0xFFFF
            if index >= self._controller.vectors:
                raise CommandError(NvmeStatus.INVALID_FIELD, location=44)
        elif feature is FeatureId.TEMPERATURE_THRESHOLD:
            index = self._sensor(command)
        elif row.per_namespace:
            index = command.nsid
            if index != BROADCAST or feature is FeatureId.WRITE_PROTECTION:
                self._controller.inventory.attached(index)
            elif command.opcode != 0x09:  # only a set is of all at once
                raise CommandError(NvmeStatus.INVALID_NAMESPACE, location=4)
        return row, (feature, index)

    def _sensor(self, command: NvmeCommand) -> int:
        """THSEL << 4 | TMPSEL; the model has the composite temperature and sensor 1."""
        sensor, kind = command.cdw11 >> 16 & 15, command.cdw11 >> 20 & 3
        writes = command.opcode == 0x09
        if kind > _UNDER or not (sensor <= 1 or (sensor == _ALL_SENSORS and writes)):
            raise CommandError(NvmeStatus.INVALID_FIELD, location=46)
        return kind << 4 | sensor

    def _keys(self, key: _Key, command: NvmeCommand) -> list[_Key]:
        """The keys of all values that a Set Features command changes."""
        feature, index = key
        if feature is FeatureId.TEMPERATURE_THRESHOLD and index & 15 == _ALL_SENSORS:
            return [(feature, index & 0x30 | sensor) for sensor in (_COMPOSITE, 1)]
        if feature is FeatureId.ERROR_RECOVERY and index == BROADCAST:
            return [(feature, namespace.nsid) for namespace in self._controller.inventory.active]
        return [key]

    @staticmethod
    def _stored(key: _Key, value: int) -> int:
        return value & 0xFFFF if key[0] is FeatureId.TEMPERATURE_THRESHOLD else value

    def _default(self, feature: FeatureId, index: int) -> int:
        if feature is FeatureId.TEMPERATURE_THRESHOLD:
            return WARNING_TEMPERATURE if index in (_OVER << 4, _OVER << 4 | 1) else 0
        if feature is FeatureId.INTERRUPT_VECTOR:
            return index
        return _TABLE[feature].default

    # ---- what setting one does -------------------------------------------------------------

    def _set_power(self, command: NvmeCommand, data: bytes) -> None:
        if command.cdw11 & 0x1F:  # there is power state 0 only
            raise CommandError(NvmeStatus.INVALID_FIELD, location=44)

    def _set_recovery(self, command: NvmeCommand, data: bytes) -> None:
        if command.cdw11 & 1 << 16:  # NSFEAT: no error for blocks that are deallocated
            raise CommandError(NvmeStatus.INVALID_FIELD, location=46)

    def _queues(self) -> int:
        count = self._controller.params.queues - 1
        return count << 16 | count

    def _set_queues(self, command: NvmeCommand, data: bytes) -> int:
        if self._controller.has_io_queues:
            raise CommandError(NvmeStatus.COMMAND_SEQUENCE)
        if command.cdw11 & 0xFFFF == 0xFFFF or command.cdw11 >> 16 == 0xFFFF:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=44)
        return self._queues()

    def _set_vector(self, command: NvmeCommand, data: bytes) -> None:
        """5.21.1.9: the host configures a vector that one of its I/O completion queues has."""
        vectors = {queue.vector for qid, queue in self._controller.completion.items() if qid}
        if command.cdw11 & 0xFFFF not in vectors:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=44)

    def _set_events(self, command: NvmeCommand, data: bytes) -> None:
        if command.cdw11 & ~(_SMART_EVENTS | _NOTICES):
            raise CommandError(NvmeStatus.INVALID_FIELD, location=44)

    def _set_timestamp(self, command: NvmeCommand, data: bytes) -> None:
        self._clock = int.from_bytes(data[:6], "little") - time.monotonic() * 1000
        self._clock_origin = 1

    def _timestamp(self) -> bytes:
        now = int(time.monotonic() * 1000 + self._clock) & 0xFFFF_FFFF_FFFF
        return now.to_bytes(6, "little") + struct.pack("<BB", self._clock_origin << 1, 0)

    def _set_keep_alive(self, command: NvmeCommand, data: bytes) -> None:
        self._controller.keep_alive(command.cdw11)

    def _set_host_identifier(self, command: NvmeCommand, data: bytes) -> None:
        if not command.cdw11 & _EXTENDED:
            data = data.ljust(16, b"\0")
        if self._host_identifier != bytes(16) and data != self._host_identifier:
            raise CommandError(NvmeStatus.COMMAND_SEQUENCE)
        self._host_identifier = data

    def _set_protection(self, command: NvmeCommand, data: bytes) -> None:
        namespace = self._controller.inventory.attached(command.nsid)
        wanted = command.cdw11 & 7
        if wanted > Protection.UNTIL_POWER_CYCLE:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=44)
        if namespace.protection is Protection.UNTIL_POWER_CYCLE and wanted != namespace.protection:
            raise CommandError(NvmeStatus.FEATURE_NOT_CHANGEABLE, location=44)
        namespace.protection = Protection(wanted)
