"""Machine files: TOML to objects, and every mistake in one line that says what would be right.

```toml
[machine]
name = "edu-demo"
memory = "512M"

[[device]]
name = "edu0"
model = "edu"                  # a built-in, or "path/file.py:Class", or "package.module:Class"
address = "0000:00:03.0"
params = { }
```
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vmodel.device import PciDevice
from vmodel.devices import BUILTIN
from vmodel.errors import ConfigError, VmodelError
from vmodel.qemu import device_args, memory_args
from vmodel.server import MAX_SOCKET_PATH, Server
from vmodel.span import GiB, KiB, MiB

_UNITS = {"": 1, "K": KiB, "M": MiB, "G": GiB}
_ADDRESS = re.compile(r"([0-9a-f]{4}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,39}")


class MachineErrors(ConfigError):
    """Several mistakes in one file; str() gives a line for each."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = list(errors)


# ---- the schema ------------------------------------------------------------------------------------


def _memory(value: str) -> str:
    match = re.fullmatch(r"(\d+)([KMG]?)", value)
    if match is None or not 32 * MiB <= int(match[1]) * _UNITS[match[2]] <= 1 << 40:
        raise ValueError('must be a size from "32M" to "1024G", as "512M"')
    if int(match[1]) * _UNITS[match[2]] % MiB:
        raise ValueError('must be whole mebibytes, as "512M"')
    return value


def _address(value: str) -> str:
    match = _ADDRESS.fullmatch(value)
    if match is None or int(match[3], 16) > 31:
        raise ValueError('must be "SSSS:BB:DD.F" (segment, bus, device 00-1f, function 0-7), as "0000:00:03.0"')
    if int(match[1], 16) or int(match[2], 16):
        raise ValueError('must be on segment 0000, bus 00, the only bus there is without bridges, as "0000:00:03.0"')
    if int(match[3], 16) in (0, 31):
        raise ValueError("is QEMU's own on the q35 machine (host bridge and LPC): use device 01 to 1e")
    return value.lower()


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("must be a letter, then up to 39 letters, digits, '_', '.' or '-': it names a socket file")
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MachineTable(_Strict):
    """`[machine]`."""

    name: Annotated[str, AfterValidator(_name)]
    memory: Annotated[str, AfterValidator(_memory)] = "512M"


class DeviceTable(_Strict):
    """`[[device]]`."""

    name: Annotated[str, AfterValidator(_name)]
    model: str
    address: Annotated[str, AfterValidator(_address)]
    params: dict[str, Any] = Field(default_factory=dict)


class MachineFile(_Strict):
    """The whole file."""

    machine: MachineTable
    device: list[DeviceTable] = Field(default_factory=list)


# ---- errors of pydantic, in the user's words -------------------------------------------------------


def _where(location: Sequence[int | str]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _fields_at(location: Sequence[int | str], root: type[BaseModel]) -> list[str]:
    model: Any = root
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation: Any = model.model_fields[part].annotation if hasattr(model, "model_fields") else None
        arguments = getattr(annotation, "__args__", (annotation,))
        model = arguments[0]
    return list(model.model_fields) if hasattr(model, "model_fields") else []


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known)) or 'none'}"


def explain(error: ValidationError, file: Path | str, root: type[BaseModel], prefix: str = "") -> Iterator[ConfigError]:
    """Each mistake that pydantic found as one ConfigError."""
    for detail in error.errors(include_url=False):
        location = detail["loc"]
        key = f"{prefix}.{_where(location)}" if prefix else _where(location)
        if detail["type"] == "extra_forbidden":
            message = f"unknown key: {_suggest(str(location[-1]), _fields_at(location, root))}"
        elif detail["type"] == "missing":
            message = "is missing"
        else:
            text = detail["msg"].removeprefix("Value error, ")
            message = f"{detail['input']!r}: {text[0].lower()}{text[1:]}"
        yield ConfigError(message, file=file, key=key)


# ---- models ----------------------------------------------------------------------------------------


def load_model(name: str, base: Path | None = None) -> type[PciDevice]:
    """The class that a `model` key names; paths count from `base`.  ConfigError when there is none."""
    target = BUILTIN.get(name, name)
    source, colon, class_name = target.rpartition(":")
    if not colon or not source or not class_name.isidentifier():
        raise ConfigError(
            f"unknown model {name!r}: {_suggest(name, list(BUILTIN))}"
            ' (or "path/file.py:Class", or "package.module:Class")'
        )
    try:
        if source.endswith(".py"):
            path = (base or Path()) / source
            if not path.is_file():
                raise ConfigError(f"model {name!r}: there is no file {path}")
            module = _load_file(path.resolve())
        else:
            module = importlib.import_module(source)
    except ConfigError:
        raise
    except Exception as error:
        where = _line_of(error, source)
        raise ConfigError(f"model {name!r} cannot be loaded: {type(error).__name__}: {error}{where}") from error
    model = getattr(module, class_name, None)
    if model is None:
        classes = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, PciDevice)]
        raise ConfigError(f"model {name!r}: no class {class_name!r} in {source}: {_suggest(class_name, classes)}")
    if not isinstance(model, type) or not issubclass(model, PciDevice) or not hasattr(model, "vendor_id"):
        raise ConfigError(f"model {name!r}: {class_name} is no PciDevice with a vendor_id")
    return model


def _load_file(path: Path) -> Any:
    name = f"vmodel_user_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _line_of(error: BaseException, source: str) -> str:
    """Where in the user's file it happened, if it did there."""
    trace = error.__traceback__
    line = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(source):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" ({source} line {line})" if line else ""


# ---- machines --------------------------------------------------------------------------------------


class Machine:
    """What a machine file says, checked, with its devices made."""

    def __init__(self, content: MachineFile, file: Path) -> None:
        self.file = file
        self.name = content.machine.name
        self.memory = content.machine.memory
        self.tables = content.device
        errors: list[ConfigError] = list(self._clashes())
        models: dict[str, type[PciDevice]] = {}
        for n, table in enumerate(self.tables):
            try:
                models[table.name] = load_model(table.model, file.parent)
            except ConfigError as error:
                errors.append(ConfigError(str(error), file=file, key=f"device[{n}].model"))
        self.devices: dict[str, PciDevice] = {}
        for n, table in enumerate(self.tables):
            model = models.get(table.name)
            if model is None or table.name in self.devices:
                continue
            try:
                shared = sum(other.address[:-2] == table.address[:-2] for other in self.tables) > 1
                self.devices[table.name] = model(table.name, table.params, multifunction=shared)
            except ValidationError as error:
                errors += explain(error, file, model.Params, f"device[{n}].params")
            except (VmodelError, ValueError, OSError) as error:
                errors.append(ConfigError(str(error), file=file, key=f"device[{n}]"))
        if errors:
            self.close()
            raise MachineErrors(errors)

    def _clashes(self) -> Iterator[ConfigError]:
        names: dict[str, int] = {}
        addresses: dict[str, str] = {}
        for n, table in enumerate(self.tables):
            if table.name in names:
                yield ConfigError(
                    f"{table.name!r} is device[{names[table.name]}]'s name already: give each its own",
                    file=self.file,
                    key=f"device[{n}].name",
                )
            names.setdefault(table.name, n)
            if table.address in addresses:
                yield ConfigError(
                    f"{table.address!r} is taken by {addresses[table.address]!r}: give each device its own",
                    file=self.file,
                    key=f"device[{n}].address",
                )
            addresses.setdefault(table.address, table.name)
        for n, table in enumerate(self.tables):
            if table.address[-1] != "0" and f"{table.address[:-1]}0" not in addresses:
                yield ConfigError(
                    f"{table.address!r} needs a device at function 0 of the same slot, {table.address[:-1]}0",
                    file=self.file,
                    key=f"device[{n}].address",
                )

    def serve(self, run_dir: Path) -> Server:
        """A server with all devices bound, DIR/NAME.sock each.  ConfigError as in Server.add."""
        server = Server()
        try:
            for name, device in self.devices.items():
                server.add(device, self.socket(name, run_dir))
        except BaseException:
            server.stop()
            raise
        return server

    def socket(self, name: str, run_dir: Path) -> Path:
        """Where a device is served."""
        path = run_dir / f"{name}.sock"
        if len(str(path).encode()) > MAX_SOCKET_PATH:
            raise ConfigError(f"{path} is longer than a socket's path may be ({MAX_SOCKET_PATH} bytes): use --run-dir")
        return path

    def qemu_args(self, run_dir: Path) -> list[str]:
        """What makes QEMU this machine: shared memory, and a -device for each function."""
        args = memory_args(self.memory)
        # Function 0 last: QEMU makes a slot's functions known to the guest with it.
        for table in sorted(self.tables, key=lambda t: (t.address[:-1], -int(t.address[-1]))):
            shared = sum(other.address[:-2] == table.address[:-2] for other in self.tables) > 1
            args += device_args(table.name, self.socket(table.name, run_dir), table.address, shared)
        return args

    def close(self) -> None:
        """Gives back what the devices hold."""
        for device in self.devices.values():
            device.close()


def parse(text: str, file: Path) -> MachineFile:
    """A machine file's text, checked against the schema.  MachineErrors."""
    try:
        raw: Mapping[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {str(error)[0].lower()}{str(error)[1:]}", file=file) from error
    try:
        return MachineFile.model_validate(raw)
    except ValidationError as error:
        raise MachineErrors(list(explain(error, file, MachineFile))) from error


def load(path: Path) -> Machine:
    """The machine that a file describes.  ConfigError, one line for each mistake."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text at byte {error.start}", file=path) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=path) from error
    return Machine(parse(text, path), path)
