"""CMSIS-SVD, the System View Description of Arm's CMSIS (version 1.3.10), read into drafts.

The package peakrdl-svd (0.1.0) leaves out what it does not know without saying so, and needs all of PeakRDL; this
reader refuses it.  Vendor extensions, interrupts and CPU are ignored: no bank does anything about them.  So are
enumerated values with "don't care" bits, and the one of all other values.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vmodel.fields import near
from vmodel.modes import Mode, Read, Write
from vmodel.spec.draft import MAX_DEPTH, WHOLE, FieldDraft, FileDraft, RegisterDraft, SourcePlace, ValuesDraft, text_of
from vmodel.spec.xml_tree import Element, parse

#: Most elements of a `dim`.
_MAX_DIM = 1 << 16
_WRITES = {
    "modify": Write.STORES,
    "oneToSet": Write.ONE_SETS,
    "oneToClear": Write.ONE_CLEARS,
    "oneToToggle": Write.ONE_TOGGLES,
    "zeroToSet": Write.ZERO_SETS,
    "zeroToClear": Write.ZERO_CLEARS,
    "zeroToToggle": Write.ZERO_TOGGLES,
    "clear": Write.CLEARS,
    "set": Write.SETS,
}
_READS = {
    "clear": Read.CLEARS,
    "set": Read.SETS,
    # What the read does is the model's to say, in a hook.
    "modify": Read.NOTHING,
    "modifyExternal": Read.NOTHING,
}
_ACCESSES = ("read-only", "read-write", "write-only", "writeOnce", "read-writeOnce")


@dataclass(frozen=True)
class _Defaults:
    """The register properties that an element has from those around it (SVD: registerPropertiesGroup)."""

    size: int = 32
    access: str = "read-write"
    reset: int = 0
    reset_mask: int = (1 << 64) - 1


def read_svd(path: Path, name: str | None) -> FileDraft:
    """The peripheral `name`; None: the only one, or all, each at its address after the lowest one.  ConfigError."""
    root = parse(path)
    return _SvdReader(path, root).device(root, name)


class _SvdReader:
    def __init__(self, path: Path, root: Element) -> None:
        self._path, self._root = path, root
        #: All that have a name, by name; made when it is needed.
        self._enumerations: dict[str, Element] = {}
        #: Registers made so far.
        self._count = 0

    # ---- elements -----------------------------------------------------------------------------

    def _place(self, element: Element) -> SourcePlace:
        return SourcePlace(self._path, element.line, self._text(element, "name") or element.tag)

    def _refuse(self, element: Element, message: str) -> NoReturn:
        raise self._place(element).error(message)

    def _text(self, element: Element, tag: str) -> str:
        child = element.find(tag)
        return "" if child is None else child.text.strip()

    def _number(self, element: Element, tag: str, default: int | None = None) -> int:
        text = self._text(element, tag)
        if not text:
            if default is None:
                self._refuse(element, f"lacks <{tag}>")
            return default
        for pattern, base in (
            (r"\+?0[xX]([0-9a-fA-F]{1,16})", 16),
            (r"(?:#|0b)([01]{1,64})", 2),
            (r"\+?([0-9]{1,20})", 10),
        ):
            found = re.fullmatch(pattern, text)
            if found:
                return int(found[1], base)
        raise self._place(element).error(f"<{tag}> {text[:40]!r} is no number")

    def _defaults(self, element: Element, outer: _Defaults) -> _Defaults:
        access = self._text(element, "access") or outer.access
        if access not in _ACCESSES:
            self._refuse(element, near("access", "value", access, _ACCESSES))
        return _Defaults(
            self._number(element, "size", outer.size),
            access,
            self._number(element, "resetValue", outer.reset),
            self._number(element, "resetMask", outer.reset_mask),
        )

    def _derived(
        self, element: Element, named: Mapping[tuple[str, str], Element], seen: tuple[Element, ...] = ()
    ) -> Element:
        """The element with what it is derived from; that is named by itself or by a path, of which the end counts.

        `named`: it and those beside it, by tag and name.
        """
        wanted = element.attributes.get("derivedFrom")
        if wanted is None:
            return element
        base = named.get((element.tag, wanted)) or named.get((element.tag, wanted.rpartition(".")[2]))
        if base is None:
            known = [name for tag, name in named if tag == element.tag]
            self._refuse(element, near("derivedFrom", element.tag, wanted, known))
        if base is element or base in seen:
            self._refuse(element, f"is derived from itself, by way of {wanted}")
        if len(seen) >= MAX_DEPTH:
            self._refuse(element, f"more than {MAX_DEPTH} elements derived from one another")
        base = self._derived(base, named, (*seen, element))
        merged = Element(element.tag, {}, element.line)
        own = {child.tag for child in element.children}
        kept = [child for child in base.children if child.tag not in own and child.tag not in ("dim", "dimIndex")]
        merged.children = [*element.children, *kept]
        return merged

    def _each(self, element: Element, *tags: str) -> Iterator[Element]:
        named = {(child.tag, self._text(child, "name")): child for child in element.all(*tags)}
        for child in element.all(*tags):
            yield self._derived(child, named)

    # ---- device, peripherals, clusters ----------------------------------------------------------

    def device(self, device: Element, name: str | None) -> FileDraft:
        """The draft of a device, or of one peripheral."""
        defaults = self._defaults(device, _Defaults())
        peripherals = list(self._each(device.find("peripherals") or device, "peripheral"))
        names = [self._text(peripheral, "name") for peripheral in peripherals]
        if name is not None:
            if name not in names:
                self._refuse(device, near("it", "peripheral", name, names))
            return self._peripheral(peripherals[names.index(name)], defaults, None)
        if not peripherals:
            self._refuse(device, "has no peripheral")
        if len(peripherals) == 1:
            return self._peripheral(peripherals[0], defaults, None)
        lowest = min(self._number(peripheral, "baseAddress") for peripheral in peripherals)
        members = tuple(self._peripheral(peripheral, defaults, lowest) for peripheral in peripherals)
        size = max(member.offset + member.size for member in members)
        device_name = self._name(device, self._text(device, "name"))
        return FileDraft(offset=0, size=size, members=members, **self._named(device, device_name), kind=device_name)

    def _peripheral(self, element: Element, outer: _Defaults, base: int | None) -> FileDraft:
        if self._text(element, "dim"):
            self._refuse(element, "an array of peripherals")
        at = 0 if base is None else self._number(element, "baseAddress") - base
        blocks = [self._number(b, "offset", 0) + self._number(b, "size") for b in element.all("addressBlock")]
        registers = element.find("registers")
        if registers is None:
            self._refuse(element, "lacks <registers>")
        name = self._name(element, self._text(element, "name"))
        draft = self._file(element, registers, name, at, self._defaults(element, outer), 1)
        return dataclasses.replace(draft, size=max(draft.size, *blocks, 0))

    def _file(
        self, element: Element, inside: Element, name: str, at: int, defaults: _Defaults, depth: int
    ) -> FileDraft:
        if depth > MAX_DEPTH:
            self._refuse(element, f"more than {MAX_DEPTH} clusters within each other")
        members: list[RegisterDraft | FileDraft] = []
        for child in self._each(inside, "register", "cluster"):
            offset = self._number(child, "addressOffset")
            inner = self._defaults(child, defaults)

            def make(
                name: str, child: Element = child, offset: int = offset, inner: _Defaults = inner
            ) -> RegisterDraft | FileDraft:
                if child.tag == "register":
                    return self._register(child, name, offset, inner)
                return self._file(child, child, name, offset, inner, depth + 1)

            members += self._repeated(child, make)
        size = max((m.offset + _extent(m) for m in members), default=0)
        return FileDraft(offset=at, size=size, members=tuple(members), **self._named(element, name), kind=name)

    def _doc(self, element: Element) -> str:
        return text_of(self._text(element, "description"))

    def _named(self, element: Element, name: str) -> dict[str, Any]:
        """What all drafts have."""
        return {"name": name, "doc": self._doc(element), "place": self._place(element)}

    def _name(self, element: Element, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w{0,199}", name, re.ASCII):
            self._refuse(element, f"the name {name[:40]!r} is no identifier")
        return name

    def _repeated(
        self, element: Element, make: Callable[[str], RegisterDraft | FileDraft]
    ) -> Iterator[RegisterDraft | FileDraft]:
        """What an element stands for: an array if its name ends with "[%s]", a list if it contains "%s" (SVD: dim)."""
        name = self._text(element, "name")
        if not self._text(element, "dim"):
            yield make(self._name(element, name))
            return
        count, step = self._number(element, "dim"), self._number(element, "dimIncrement")
        if not 1 <= count <= _MAX_DIM:
            self._refuse(element, f"<dim> {count} is not 1 to {_MAX_DIM}")
        if name.endswith("[%s]"):
            draft = make(self._name(element, name.removesuffix("[%s]")))
            yield dataclasses.replace(draft, dimensions=(count,), stride=step)
            return
        for n, index in enumerate(self._indices(element, count)):
            self._count += 1
            if self._count > _MAX_DIM:
                self._refuse(element, f"more than {_MAX_DIM} registers")
            draft = make(self._name(element, name.replace("%s", index)))
            yield dataclasses.replace(draft, offset=draft.offset + n * step)

    def _indices(self, element: Element, count: int) -> list[str]:
        name, text = self._text(element, "name"), self._text(element, "dimIndex")
        if "%s" not in name:
            self._refuse(element, "its name lacks %s, where the index goes")
        letters = re.fullmatch(r"([A-Z])-([A-Z])", text)
        numbers = re.fullmatch(r"(\d{1,6})-(\d{1,6})", text)
        if not text:
            indices = [str(n) for n in range(count)]
        elif letters:
            indices = [chr(n) for n in range(ord(letters[1]), ord(letters[2]) + 1)]
        elif numbers:
            indices = [str(n) for n in range(int(numbers[1]), int(numbers[2]) + 1)]
        else:
            indices = [part.strip() for part in text.split(",")]
        if len(indices) != count:
            self._refuse(element, f"<dimIndex> has {len(indices)} values, <dim> is {count}")
        return indices

    # ---- registers and fields -------------------------------------------------------------------

    def _register(self, element: Element, name: str, offset: int, defaults: _Defaults) -> RegisterDraft:
        reset = defaults.reset & defaults.reset_mask
        fields: list[FieldDraft] = []
        for field in self._each(element.find("fields") or Element("fields", {}, element.line), "field"):
            fields += self._field(field, element, defaults, reset)
        if not fields:
            mode = self._mode((element,), defaults.access)
            whole = {**self._named(element, WHOLE), "doc": ""}
            fields = [FieldDraft(lo=0, hi=defaults.size - 1, mode=mode, reset=reset, **whole)]
        fields.sort(key=lambda f: f.lo)
        width, named = defaults.size, self._named(element, name)
        return RegisterDraft(offset=offset, width=width, fields=tuple(fields), **named, kind=name)

    def _field(self, element: Element, register: Element, defaults: _Defaults, reset: int) -> Iterator[FieldDraft]:
        lo, hi = self._bits(element)
        mode = self._mode((element, register), self._text(element, "access") or defaults.access)
        name, names, step = self._text(element, "name"), [""], 0
        values = self._values(element)
        if self._text(element, "dim"):
            count, step = self._number(element, "dim"), self._number(element, "dimIncrement")
            if not 1 <= count <= 64:
                self._refuse(element, f"<dim> {count} is not 1 to 64")
            names = self._indices(element, count)
        for n, index in enumerate(names):
            low, high = lo + n * step, hi + n * step
            value = reset >> low & ((1 << (high - low + 1)) - 1)
            called = self._name(element, name.replace("%s", index))
            named = self._named(element, called)
            yield FieldDraft(lo=low, hi=high, mode=mode, reset=value, values=values, **named)

    def _values(self, field: Element) -> ValuesDraft | None:
        """The names of a field's values: those for reads and those for writes together, the first of a name counts."""
        found: dict[str, tuple[str, int, str]] = {}
        called = ""
        for values in field.all("enumeratedValues"):
            values = self._derived_values(values)
            called = called or self._text(values, "name") or self._text(values, "headerEnumName")
            for member in values.all("enumeratedValue"):
                text = self._text(member, "value")
                if not text or re.fullmatch(r"(#|0b)[01xX]*[xX][01xX]*", text):
                    continue
                value = self._number(member, "value")
                name = re.sub(r"\W", "_", self._text(member, "name"), flags=re.ASCII) or f"VALUE{value}"
                name = f"n{name}" if name[0].isdigit() else name
                if all(value != other for _, other, _ in found.values()):
                    found.setdefault(name, (name, value, self._doc(member)))
        return ValuesDraft(called or self._text(field, "name"), tuple(found.values())) if found else None

    def _derived_values(self, values: Element) -> Element:
        """The values themselves, or those that they are derived from; a path's end counts, as it does elsewhere."""
        seen = [values]
        while "derivedFrom" in values.attributes:
            wanted = values.attributes["derivedFrom"]
            if not self._enumerations:
                self._enumerations = {self._text(each, "name"): each for each in self._root.every("enumeratedValues")}
            found = self._enumerations.get(wanted.rpartition(".")[2])
            if found is None:
                self._refuse(values, near("derivedFrom", values.tag, wanted, list(self._enumerations)))
            if found in seen:
                self._refuse(values, f"is derived from itself, by way of {wanted}")
            seen.append(found)
            values = found
        return values

    def _bits(self, element: Element) -> tuple[int, int]:
        text = self._text(element, "bitRange")
        found = re.fullmatch(r"\[(\d{1,2}):(\d{1,2})\]", text)
        if text and not found:
            self._refuse(element, f"<bitRange> {text[:40]!r} is not [msb:lsb]")
        if found:
            hi, lo = int(found[1]), int(found[2])
        elif element.find("lsb") is not None:
            lo, hi = self._number(element, "lsb"), self._number(element, "msb")
        else:
            lo = self._number(element, "bitOffset")
            hi = lo + self._number(element, "bitWidth", 1) - 1
        if not 0 <= lo <= hi < 64:
            self._refuse(element, f"bits {hi}:{lo} are not within 63:0")
        return lo, hi

    def _mode(self, elements: Sequence[Element], access: str) -> Mode:
        """The mode of a field, or of a register without fields; the first of `elements` that says something counts."""
        here = elements[0]
        if access in ("writeOnce", "read-writeOnce"):
            self._refuse(
                here, f"access {access} has no meaning here: how often a field was written is a hook's to know"
            )
        if access not in _ACCESSES:
            self._refuse(here, near("access", "value", access, _ACCESSES))
        written = next(filter(None, (self._text(e, "modifiedWriteValues") for e in elements)), "modify")
        read = next(filter(None, (self._text(e, "readAction") for e in elements)), "modify")
        if written not in _WRITES:
            self._refuse(here, near("modifiedWriteValues", "value", written, list(_WRITES)))
        if read not in _READS:
            self._refuse(here, near("readAction", "value", read, list(_READS)))
        if access == "write-only":
            if written not in ("modify", "oneToSet", "oneToClear"):
                self._refuse(here, f"modifiedWriteValues {written} of a field that software cannot read")
            return Mode.WO
        return Mode.of(Write.NOTHING if access == "read-only" else _WRITES[written], _READS[read])


def _extent(member: RegisterDraft | FileDraft) -> int:
    """The bytes from the first to the last byte of a member."""
    size = member.width // 8 if isinstance(member, RegisterDraft) else member.size
    return size + (member.dimensions[0] - 1) * member.stride if member.dimensions else size
