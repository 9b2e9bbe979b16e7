"""SystemRDL 2.0 and IP-XACT, as Accellera's compiler model (systemrdl-compiler) has them.

Only what software sees is taken over.  What is about the hardware's side of a field (`we`, `hwset`, `counter`, `intr`
and others) is the model's own work in Python, and `regblock`'s signals have no counterpart.  A property that changes
what software sees, and that a bank cannot express, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from systemrdl import component as components
from systemrdl.compiler import RDLCompiler
from systemrdl.importer import RDLImporter
from systemrdl.messages import RDLCompileError, Severity
from systemrdl.node import AddressableNode, AddrmapNode, FieldNode, MemNode, Node, RegfileNode, RegNode
from systemrdl.rdltypes.builtin_enums import AccessType, OnReadType, OnWriteType
from systemrdl.rdltypes.user_enum import UserEnum
from systemrdl.source_ref import DetailedFileSourceRef, FileSourceRef, SourceRefBase

from vmodel.config_file import read_text
from vmodel.errors import ConfigError
from vmodel.fields import near
from vmodel.modes import Mode, Read, Write
from vmodel.spec.draft import (
    MAX_DEPTH,
    FieldDraft,
    FileDraft,
    RamDraft,
    RegisterDraft,
    SourcePlace,
    ValuesDraft,
    text_of,
)

#: Most components of a specification, arrays counted once.
MAX_COMPONENTS = 1 << 16

_WRITES = {
    None: Write.STORES,
    OnWriteType.woset: Write.ONE_SETS,
    OnWriteType.woclr: Write.ONE_CLEARS,
    OnWriteType.wot: Write.ONE_TOGGLES,
    OnWriteType.wzs: Write.ZERO_SETS,
    OnWriteType.wzc: Write.ZERO_CLEARS,
    OnWriteType.wzt: Write.ZERO_TOGGLES,
    OnWriteType.wclr: Write.CLEARS,
    OnWriteType.wset: Write.SETS,
    # What the write does is the model's to say, in a hook.
    OnWriteType.wuser: Write.STORES,
}
_READS = {
    None: Read.NOTHING,
    OnReadType.rclr: Read.CLEARS,
    OnReadType.rset: Read.SETS,
    OnReadType.ruser: Read.NOTHING,
}
#: Properties that say what software sees, and that nothing here does.
_REFUSED = {
    "swwe": "a hook can return the stored value while writes are locked",
    "swwel": "a hook can return the stored value while writes are locked",
    "resetsignal": "all registers have the device's reset; one that keeps its value is Reg32(..., sticky=True)",
    "bigendian": "registers of PCI devices are little-endian",
    "msb0": "bit 0 is the least significant one",
}


class _Printer:
    """A systemrdl.messages.MessagePrinter that keeps the first error."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.first: ConfigError | None = None

    def print_message(self, severity: Severity, text: str, src_ref: SourceRefBase | None) -> None:
        if severity >= Severity.ERROR and self.first is None:
            self.first = _place(src_ref, self.file).error(" ".join(text.split()))


def _place(reference: SourceRefBase | None, file: Path, path: str = "") -> SourcePlace:
    if isinstance(reference, DetailedFileSourceRef):
        return SourcePlace(Path(reference.path), reference.line, path)
    return SourcePlace(Path(reference.path) if isinstance(reference, FileSourceRef) else file, 0, path)


def read_systemrdl(path: Path, name: str | None, read: list[Path] | None = None) -> FileDraft:
    """The address map `name` of a SystemRDL file; None: the last one.  `read` gets the files.  ConfigError."""
    text = read_text(path)
    for n, line in enumerate(text.splitlines(), 1):
        if "<%" in line:
            raise SourcePlace(path, n).error("embedded Perl is not run: expand it first")

    def compile_(compiler: RDLCompiler) -> None:
        # Perl code of an included file may do nothing at all.
        info = compiler.compile_file(str(path))
        if read is not None:
            read.extend([path, *map(Path, info.included_files)])

    return _read(path, name, compile_)


def read_ipxact(path: Path, name: str | None, read: list[Path] | None = None) -> FileDraft:
    """The memory map `name` of an IP-XACT component; None: the last one.  `read` gets the file.  ConfigError."""
    from peakrdl_ipxact import IPXACTImporter

    read_text(path)
    if read is not None:
        read.append(path)
    return _read(path, name, lambda compiler: _imported(IPXACTImporter(compiler), path))


def _imported(importer: RDLImporter, path: Path) -> None:
    importer.import_file(str(path))


def _read(path: Path, name: str | None, compile_: Callable[[RDLCompiler], object]) -> FileDraft:
    printer = _Printer(path)
    compiler = RDLCompiler(message_printer=printer, perl_safe_opcodes=[])
    try:
        compile_(compiler)
        maps = [key for key, found in compiler.root.comp_defs.items() if isinstance(found, components.Addrmap)]
        if name is not None and name not in maps:
            raise SourcePlace(path).error(near("it", "address map", name, maps))
        if not maps:
            raise SourcePlace(path).error("has no address map")
        count = _components(compiler.root.comp_defs[name or maps[-1]], {})
        if count > MAX_COMPONENTS:
            raise SourcePlace(path).error(f"has {count} components, more than {MAX_COMPONENTS}")
        top = compiler.elaborate(name or maps[-1]).top
        return _NodeReader(path).file(top, 0)
    except RDLCompileError as error:
        raise printer.first or SourcePlace(path).error(" ".join(str(error).split())) from error
    except ConfigError:
        raise
    except RecursionError as error:
        raise SourcePlace(path).error("is nested too deeply") from error
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, SyntaxError, OSError) as error:
        # A file that the compiler did not expect.
        raise SourcePlace(path).error(
            f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error


def _components(top: Any, counted: dict[int, int]) -> int:
    """How many components `top` consists of; before elaboration they share their children."""
    if id(top) not in counted:
        counted[id(top)] = 1 + sum(_components(child, counted) for child in top.children)
    return counted[id(top)]


class _NodeReader:
    """Makes drafts of an elaborated design."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _at(self, node: Node, name: str = "") -> SourcePlace:
        reference = node.property_src_ref.get(name) if name else None
        path = node.get_path(array_suffix="", empty_array_suffix="")
        return _place(reference or node.inst_src_ref or node.def_src_ref, self._path, path)

    def _refuse(self, node: Node, name: str, why: str) -> NoReturn:
        raise self._at(node, name).error(f"{name} has no meaning here: {why}")

    def _check(self, node: Node) -> None:
        for name in node.list_properties(include_udp=False):
            if name in _REFUSED and node.get_property(name):
                self._refuse(node, name, _REFUSED[name])

    def _doc(self, node: Node) -> str:
        return text_of(node.get_property("desc")) or (
            text_of(node.get_property("name")) if "name" in node.list_properties() else ""
        )

    def file(self, node: AddrmapNode | RegfileNode, depth: int) -> FileDraft:
        """The draft of an address map or register file."""
        self._check(node)
        if depth > MAX_DEPTH:
            raise self._at(node).error(f"more than {MAX_DEPTH} register files within each other")
        members: list[RegisterDraft | RamDraft | FileDraft] = []
        for child in node.children():
            if isinstance(child, RegNode):
                members.append(self._register(child))
            elif isinstance(child, MemNode):
                members.append(self._ram(child))
            elif isinstance(child, AddrmapNode | RegfileNode):
                members.append(self.file(child, depth + 1))
        return FileDraft(size=node.size, members=tuple(members), **self._repeatable(node))

    def _ram(self, node: MemNode) -> RamDraft:
        self._check(node)
        if node.is_array:
            raise self._at(node).error("an array of memories: put the memory into an address map, and repeat that")
        sw = node.get_property("sw")
        if sw not in (AccessType.rw, AccessType.r):
            self._refuse(node, "sw", f"a memory is rw or r, not {sw.name}")
        mode = Mode.RW if sw is AccessType.rw else Mode.RO
        return RamDraft(offset=node.raw_address_offset, size=node.size, mode=mode, **self._named(node))

    def _register(self, node: RegNode) -> RegisterDraft:
        self._check(node)
        if node.is_alias:
            raise self._at(node).error("alias has no meaning here: a register is at one place")
        fields = sorted(self._fields(node), key=lambda f: f.lo)
        return RegisterDraft(width=node.get_property("regwidth"), fields=tuple(fields), **self._repeatable(node))

    def _named(self, node: Node) -> dict[str, Any]:
        """What all drafts have."""
        return {"name": node.inst_name, "doc": self._doc(node), "place": self._at(node)}

    def _repeatable(self, node: AddressableNode) -> dict[str, Any]:
        """What the drafts of registers and register files have."""
        return {
            **self._named(node),
            "kind": node.orig_type_name or "",
            "offset": node.raw_address_offset,
            "dimensions": tuple(node.array_dimensions or ()) if node.is_array else (),
            "stride": node.array_stride or 0 if node.is_array else 0,
        }

    def _fields(self, node: RegNode) -> Iterator[FieldDraft]:
        for field in node.fields():
            self._check(field)
            reset = field.get_property("reset")
            if reset is not None and not isinstance(reset, int):
                self._refuse(field, "reset", "a reset value is a number, not another field or signal")
            yield FieldDraft(
                lo=field.low,
                hi=field.high,
                mode=self._mode(field),
                reset=reset or 0,
                values=_values(field.get_property("encode")),
                **self._named(field),
            )

    def _mode(self, field: FieldNode) -> Mode:
        sw, written, read = (field.get_property(name) for name in ("sw", "onwrite", "onread"))
        if sw is AccessType.na:
            return Mode.RESERVED
        if sw not in (AccessType.rw, AccessType.r, AccessType.w):
            self._refuse(
                field, "sw", f"{sw and sw.name}: how often a field was written is the model's to know, in a hook"
            )
        if field.get_property("singlepulse"):
            return Mode.WO
        if sw is AccessType.w:
            if written is not None and written.name not in ("woset", "woclr", "wuser"):
                self._refuse(field, "onwrite", f"{written.name} of a field that software cannot read")
            return Mode.WO
        return Mode.of(Write.NOTHING if sw is AccessType.r else _WRITES[written], _READS[read])


def _values(encode: type[UserEnum] | None) -> ValuesDraft | None:
    """The names of a field's values (SystemRDL: the property `encode` names an enumeration)."""
    if encode is None:
        return None
    members = ((member.name, int(member.value), text_of(member.rdl_desc or member.rdl_name)) for member in encode)
    return ValuesDraft(encode.type_name, tuple(members))
