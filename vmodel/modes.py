"""Access modes: what a read and a write by software do to the bits of a register."""

from __future__ import annotations

import enum


class Read(enum.Enum):
    """What a read does to the bits that it reads."""

    NOTHING = "nothing"
    CLEARS = "clears them"
    SETS = "sets them"


class Write(enum.Enum):
    """What a write does; `value` below has the written bits, `mask` the bits that are concerned."""

    NOTHING = "nothing"
    #: The bits go to the write hook and are not stored.
    PASSES = "passes them on"
    STORES = "stores them"
    ONE_CLEARS = "a 1 clears the bit"
    ONE_SETS = "a 1 sets the bit"
    ONE_TOGGLES = "a 1 toggles the bit"
    ZERO_CLEARS = "a 0 clears the bit"
    ZERO_SETS = "a 0 sets the bit"
    ZERO_TOGGLES = "a 0 toggles the bit"
    #: Any write to the register clears or sets all bits, whatever bytes and value it has.
    CLEARS = "clears them"
    SETS = "sets them"

    def apply(self, stored: int, value: int, mask: int) -> int:
        """The register's value after a write of `value` to the bits in `mask`; the others stay as in `stored`."""
        match self:
            case Write.PASSES | Write.STORES:
                return stored & ~mask | value & mask
            case Write.ONE_CLEARS:
                return stored & ~(value & mask)
            case Write.ONE_SETS:
                return stored | value & mask
            case Write.ONE_TOGGLES:
                return stored ^ value & mask
            case Write.ZERO_CLEARS:
                return stored & ~(~value & mask)
            case Write.ZERO_SETS:
                return stored | ~value & mask
            case Write.ZERO_TOGGLES:
                return stored ^ ~value & mask
            case Write.CLEARS:
                return stored & ~mask
            case Write.SETS:
                return stored | mask
        return stored


class Mode(enum.Enum):
    """Access mode of bits, as software sees them, in the usual abbreviations (those of UVM and IP-XACT).

    The value is (in words, what a write does, what a read does).
    """

    RO = ("read-only", Write.NOTHING, Read.NOTHING)
    RW = ("read-write", Write.STORES, Read.NOTHING)
    #: Reads give the reset value; a write hook gets the written value.
    WO = ("write-only", Write.PASSES, Read.NOTHING)
    W1C = ("write 1 to clear", Write.ONE_CLEARS, Read.NOTHING)
    W1S = ("write 1 to set", Write.ONE_SETS, Read.NOTHING)
    #: Read-only, and a read clears it.
    RC = ("read to clear", Write.NOTHING, Read.CLEARS)
    #: Reads give the reset value, writes are ignored.
    RESERVED = ("reserved", Write.NOTHING, Read.NOTHING)
    W1T = ("write 1 to toggle", Write.ONE_TOGGLES, Read.NOTHING)
    W0C = ("write 0 to clear", Write.ZERO_CLEARS, Read.NOTHING)
    W0S = ("write 0 to set", Write.ZERO_SETS, Read.NOTHING)
    W0T = ("write 0 to toggle", Write.ZERO_TOGGLES, Read.NOTHING)
    WC = ("any write clears", Write.CLEARS, Read.NOTHING)
    WS = ("any write sets", Write.SETS, Read.NOTHING)
    RS = ("read to set", Write.NOTHING, Read.SETS)
    WRC = ("read-write, read to clear", Write.STORES, Read.CLEARS)
    WRS = ("read-write, read to set", Write.STORES, Read.SETS)
    W1CRC = ("write 1 to clear, read to clear", Write.ONE_CLEARS, Read.CLEARS)
    W1CRS = ("write 1 to clear, read to set", Write.ONE_CLEARS, Read.SETS)
    W1SRC = ("write 1 to set, read to clear", Write.ONE_SETS, Read.CLEARS)
    W1SRS = ("write 1 to set, read to set", Write.ONE_SETS, Read.SETS)
    W1TRC = ("write 1 to toggle, read to clear", Write.ONE_TOGGLES, Read.CLEARS)
    W1TRS = ("write 1 to toggle, read to set", Write.ONE_TOGGLES, Read.SETS)
    W0CRC = ("write 0 to clear, read to clear", Write.ZERO_CLEARS, Read.CLEARS)
    W0CRS = ("write 0 to clear, read to set", Write.ZERO_CLEARS, Read.SETS)
    W0SRC = ("write 0 to set, read to clear", Write.ZERO_SETS, Read.CLEARS)
    W0SRS = ("write 0 to set, read to set", Write.ZERO_SETS, Read.SETS)
    W0TRC = ("write 0 to toggle, read to clear", Write.ZERO_TOGGLES, Read.CLEARS)
    W0TRS = ("write 0 to toggle, read to set", Write.ZERO_TOGGLES, Read.SETS)
    WCRC = ("any write clears, read to clear", Write.CLEARS, Read.CLEARS)
    WCRS = ("any write clears, read to set", Write.CLEARS, Read.SETS)
    WSRC = ("any write sets, read to clear", Write.SETS, Read.CLEARS)
    WSRS = ("any write sets, read to set", Write.SETS, Read.SETS)

    @property
    def words(self) -> str:
        """The mode in words, as "write 1 to clear"."""
        return self.value[0]

    @property
    def write(self) -> Write:
        """What a write does."""
        return self.value[1]

    @property
    def read(self) -> Read:
        """What a read does."""
        return self.value[2]

    @classmethod
    def of(cls, write: Write, read: Read) -> Mode:
        """The mode of these effects.  KeyError: there is none."""
        return _BY_EFFECTS[write, read]


_BY_EFFECTS = {(mode.write, mode.read): mode for mode in Mode if mode is not Mode.RESERVED}
