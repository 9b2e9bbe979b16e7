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

All mistakes of a file are found in one go: what is sound is checked further even where something else is wrong.
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
from types import ModuleType
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vmodel.device import PciDevice
from vmodel.devices import BUILTIN
from vmodel.errors import ConfigError
from vmodel.qemu import device_args, memory_args, spare_default_devices
from vmodel.server import MAX_SOCKET_PATH, Server
from vmodel.span import GiB, KiB, MiB

_UNITS = {"K": KiB, "M": MiB, "G": GiB}
_ADDRESS = re.compile(r"([0-9a-f]{4}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,39}")
_OTHER_MODELS = '"path/file.py:Class", or "package.module:Class"'


class MachineErrors(ConfigError):
    """The mistakes of one file; str() gives a line for each."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = list(errors)


# ---- the schema ------------------------------------------------------------------------------------


def _memory(value: str) -> str:
    match = re.fullmatch(r"([0-9]{1,9})([KMG])", value)
    if match is None:
        raise ValueError('must be a number and K, M or G, as "512M"')
    size = int(match[1]) * _UNITS[match[2]]
    if not 32 * MiB <= size <= 1024 * GiB:
        raise ValueError('must be from "32M" to "1024G"')
    if size % MiB:
        raise ValueError('must be whole mebibytes, as "512M"')
    return value


def _address(value: str) -> str:
    match = _ADDRESS.fullmatch(value)
    if match is None or int(match[3], 16) > 31:
        raise ValueError('must be "SSSS:BB:DD.F" (segment, bus, device 00-1f, function 0-7), as "0000:00:03.0"')
    if int(match[1], 16) or int(match[2], 16):
        raise ValueError('not yet: only segment 0000, bus 00 (other buses need bridges), as "0000:00:03.0"')
    if int(match[3], 16) in (0, 31):
        raise ValueError("is QEMU's own on the q35 machine (host bridge, LPC bridge): use device 01 to 1e")
    return value.lower()


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("must be a letter, then up to 39 letters, digits, '_', '.' or '-': it names a socket file")
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MachineTable(_Strict):
    """`[machine]`."""

    name: Annotated[str, AfterValidator(_name)] = Field(examples=['"edu-demo"'])
    memory: Annotated[str, AfterValidator(_memory)] = Field("512M", examples=['"512M"'])


class DeviceTable(_Strict):
    """`[[device]]`."""

    name: Annotated[str, AfterValidator(_name)] = Field(examples=['"edu0"'])
    model: str = Field(examples=['"edu"'])
    address: Annotated[str, AfterValidator(_address)] = Field(examples=['"0000:00:03.0"'])
    params: dict[str, Any] = Field(default_factory=dict, examples=["{ }"])


class MachineFile(_Strict):
    """The whole file."""

    machine: MachineTable
    device: list[DeviceTable] = Field(default_factory=list)


# ---- pydantic's errors, in the user's words --------------------------------------------------------

Location = Sequence[int | str]


def _where(location: Location) -> str:
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            bare = part if re.fullmatch(r"[\w-]+", part) else _short(part)
            text += f".{bare}" if text else bare
    return text


def _short(value: object, limit: int = 60) -> str:
    """A value as the user wrote it, more or less, on one line."""
    text = repr(value) if isinstance(value, str | int | float | dict | list) else str(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _schema_at(location: Location, root: type[BaseModel]) -> type[BaseModel] | None:
    """The schema of the table that holds the key at `location`; None where no schema says."""
    schema: type[BaseModel] = root
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        field = schema.model_fields.get(part)
        if field is None:
            return None
        # list[DeviceTable] and Table | None hold their schema as an argument.
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if inner is None:
            return None
        schema = inner
    return schema


def _guess(word: str, known: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, 1)), None)


def _as_example(location: Location, root: type[BaseModel]) -> str:
    schema = _schema_at(location, root)
    field = schema.model_fields.get(str(location[-1])) if schema else None
    if field is None:
        return ""
    if field.examples:
        return f", as {location[-1]} = {field.examples[0]}"
    return f" ({field.description})" if field.description else ""


#: What TOML calls the types that pydantic misses.
_WANTED = {
    "string_type": "must be text in quotes",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "list_type": "must be an array",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
}


def _message(detail: Mapping[str, Any], root: type[BaseModel]) -> str:
    location, kind, value = detail["loc"], detail["type"], detail["input"]
    if kind == "extra_forbidden":
        schema = _schema_at(location, root)
        known = sorted(schema.model_fields) if schema else []
        close = _guess(str(location[-1]), known)
        return (
            f"unknown key: did you mean {close!r}?" if close else f"unknown key: known are {', '.join(known) or 'none'}"
        )
    if root is MachineFile and location == ("machine",):
        wrong = "is missing" if kind == "missing" else _short(value)
        return f'{wrong}: a machine file needs a [machine] table with name = "edu-demo"'
    if root is MachineFile and location == ("device",):
        return f"{_short(value)}: must be written [[device]], in two brackets, as there may be several"
    if kind == "missing":
        return f"is missing{_as_example(location, root)}"
    if kind in _WANTED:
        return f"{_short(value)}: {_WANTED[kind]}{_as_example(location, root)}"
    text = _one_line(detail["msg"].removeprefix("Value error, ")) or "is wrong"
    return f"{_short(value)}: {text[0].lower()}{text[1:]}"


def explain(error: ValidationError, file: Path | str, root: type[BaseModel], prefix: str = "") -> Iterator[ConfigError]:
    """Each mistake that pydantic found as one ConfigError."""
    details = error.errors(include_url=False)
    guesses = set()
    for detail in details:
        if detail["type"] == "extra_forbidden" and (schema := _schema_at(detail["loc"], root)):
            guesses.add((*detail["loc"][:-1], _guess(str(detail["loc"][-1]), list(schema.model_fields))))
    for detail in details:
        location = detail["loc"]
        if detail["type"] == "missing" and location in guesses:
            continue  # it is there, misspelt: one mistake, one line
        key = ".".join(part for part in (prefix, _where(location)) if part)
        yield ConfigError(_message(detail, root), file=file, key=key)


# ---- models ----------------------------------------------------------------------------------------


def load_model(name: str, base: Path | None = None) -> type[PciDevice]:
    """The class that a `model` key names; paths count from `base`.  ConfigError when there is none."""
    target = BUILTIN.get(name, name)
    source, colon, class_name = target.rpartition(":")
    if not colon:
        if name.endswith(".py"):
            raise ConfigError(f'model {name!r}: lacks the class, as "{name}:Class"')
        close = _guess(name, list(BUILTIN))
        raise ConfigError(
            f"unknown model {name!r}: {f'did you mean {close!r}? ' if close else ''}"
            f"Built-ins are {', '.join(BUILTIN)}; else {_OTHER_MODELS}"
        )
    if not source.strip(".") or not class_name.isidentifier():
        raise ConfigError(f"model {name!r}: must be a built-in ({', '.join(BUILTIN)}), {_OTHER_MODELS}")
    module = _load_file(name, (base or Path()) / source) if source.endswith(".py") else _load_module(name, source)
    model = getattr(module, class_name, None)
    if model is None:
        classes = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, PciDevice)]
        classes = [k for k in classes if k != "PciDevice"]
        close = _guess(class_name, classes)
        there = f"did you mean {close!r}?" if close else f"models there: {', '.join(classes) or 'none'}"
        raise ConfigError(f"model {name!r}: no class {class_name!r} in {source}; {there}")
    if not isinstance(model, type) or not issubclass(model, PciDevice):
        raise ConfigError(f"model {name!r}: {class_name} must be a class derived from vmodel.device.PciDevice")
    if not hasattr(model, "vendor_id"):
        raise ConfigError(f"model {name!r}: {class_name} must declare vendor_id, device_id and class_code")
    return model


def _load_module(name: str, source: str) -> ModuleType:
    if not all(part.isidentifier() for part in source.split(".")):
        raise ConfigError(f"model {name!r}: must be a built-in ({', '.join(BUILTIN)}), {_OTHER_MODELS}")
    try:
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{source}.".startswith(f"{error.name}."):
            raise ConfigError(f"model {name!r}: there is no module {error.name!r}") from error
        raise _load_error(name, error) from error


def _load_file(name: str, path: Path) -> ModuleType:
    if "\0" in str(path) or not path.is_file():
        raise ConfigError(f"model {name!r}: there is no file {str(path)!r}")
    path = path.resolve()
    # Two devices of one model share its classes.
    alias = f"vmodel_user_{path.stem}_{abs(hash(path)):x}"
    if alias in sys.modules:
        return sys.modules[alias]
    spec = importlib.util.spec_from_file_location(alias, path)
    assert spec is not None and spec.loader is not None  # as the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[alias]
        if isinstance(error, Exception | SystemExit):
            raise _load_error(name, error) from error
        raise
    return module


def _load_error(name: str, error: BaseException) -> ConfigError:
    return ConfigError(f"model {name!r} cannot be loaded: {_describe(error)}")


def _describe(error: BaseException) -> str:
    """An exception of the user's code on one line, with the line of that code."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        # Neither the machinery of imports nor vmodel itself is where the user has to look.
        if file.is_file() and not file.is_relative_to(Path(__file__).parent):
            place = f" ({file.name} line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {_one_line(error)}{'' if isinstance(error, SyntaxError) else place}"


# ---- checks that need more than one key -------------------------------------------------------------


class _Check:
    """Finds the mistakes of a parsed file, all of them; `errors` are in the file's order."""

    def __init__(self, raw: Mapping[str, Any], file: Path) -> None:
        self.file = file
        self.content: MachineFile | None = None
        #: What is sound of each device: a key that is wrong is absent.
        self.sound: list[dict[str, Any]] = []
        self.models: dict[int, type[PciDevice]] = {}
        self._found: list[tuple[int, ConfigError]] = []
        wrong: set[Location] = set()
        try:
            self.content = MachineFile.model_validate(raw)
        except ValidationError as error:
            wrong = {detail["loc"][:3] for detail in error.errors(include_url=False)}
            for mistake in explain(error, file, MachineFile):
                number = re.match(r"device\[(\d+)\]", mistake.key)
                self._found.append((int(number[1]) if number else -1, mistake))
        tables = raw.get("device", [])
        for n, table in enumerate(tables if isinstance(tables, list) else []):
            known = table if isinstance(table, dict) else {}
            self.sound.append({k: v for k, v in known.items() if ("device", n, k) not in wrong})
        for n, table in enumerate(self.sound):
            if "address" in table:
                table["address"] = table["address"].lower()
            if "model" in table:
                self._model(n, table)
        self._clashes()

    @property
    def errors(self) -> list[ConfigError]:
        return [mistake for _, mistake in sorted(self._found, key=lambda item: item[0])]

    def _wrong(self, n: int, key: str, message: str) -> None:
        self._found.append((n, ConfigError(message, file=self.file, key=f"device[{n}].{key}")))

    def _model(self, n: int, table: Mapping[str, Any]) -> None:
        try:
            self.models[n] = model = load_model(table["model"], self.file.parent)
        except ConfigError as error:
            self._wrong(n, "model", str(error))
            return
        try:
            model.Params.model_validate(table.get("params", {}))
        except ValidationError as error:
            self._found += [(n, mistake) for mistake in explain(error, self.file, model.Params, f"device[{n}].params")]

    def _clashes(self) -> None:
        names: dict[str, int] = {}
        addresses: dict[str, int] = {}
        for n, table in enumerate(self.sound):
            if (name := table.get("name")) is not None and names.setdefault(name, n) != n:
                self._wrong(n, "name", f"{name!r} is the name of device[{names[name]}] already: give each its own")
            if (address := table.get("address")) is not None and addresses.setdefault(address, n) != n:
                other = self.sound[addresses[address]].get("name", f"device[{addresses[address]}]")
                self._wrong(n, "address", f"{address!r} is taken by {other!r}: give each device its own")
        for n, table in enumerate(self.sound):
            address = table.get("address", "0")
            if address[-1] != "0" and f"{address[:-1]}0" not in addresses:
                self._wrong(n, "address", f"{address!r} needs a device at function 0 of its slot, {address[:-1]}0")


# ---- machines --------------------------------------------------------------------------------------


class Machine:
    """What a machine file says, checked, with its devices made."""

    def __init__(self, raw: Mapping[str, Any], file: Path) -> None:
        """`raw` is what TOML has made of the file.  MachineErrors."""
        check = _Check(raw, file)
        if check.content is None or check.errors:
            raise MachineErrors(check.errors)
        self.file = file
        self.name = check.content.machine.name
        self.memory = check.content.machine.memory
        self.tables = check.content.device
        #: The devices by name, in the file's order.
        self.devices: dict[str, PciDevice] = {}
        for n, table in enumerate(self.tables):
            try:
                model = check.models[n]
                self.devices[table.name] = model(table.name, table.params, multifunction=self._shares_slot(table))
            except Exception as error:  # the model's own code: whatever it raises, the file's author chose the model
                self.close()
                text = str(error) if isinstance(error, ConfigError) else _describe(error)
                message = f"model {table.model!r} cannot be made: {text}"
                raise ConfigError(message, file=file, key=f"device[{n}].model") from error

    def _shares_slot(self, table: DeviceTable) -> bool:
        return sum(other.address[:-2] == table.address[:-2] for other in self.tables) > 1

    def serve(self, run_dir: Path) -> Server:
        """A server with all devices bound, DIR/NAME.sock each, to be started.  ConfigError as in Server.add."""
        server = Server()
        try:
            for name, device in self.devices.items():
                server.add(device, self.socket(name, run_dir))
        except BaseException:
            server.stop()
            raise
        return server

    def socket(self, name: str, run_dir: Path) -> Path:
        """Where a device is served.  ConfigError: the path is too long for a socket."""
        path = run_dir / f"{name}.sock"
        if (size := len(str(path).encode())) > MAX_SOCKET_PATH:
            n = list(self.devices).index(name)
            message = f"{name!r}: its socket {path} has {size} bytes, at most {MAX_SOCKET_PATH} work: use --run-dir"
            raise ConfigError(message, file=self.file, key=f"device[{n}].name")
        return path

    def qemu_args(self, run_dir: Path) -> list[str]:
        """What makes QEMU this machine: shared memory, and a -device for each function."""
        args = memory_args(self.memory) + spare_default_devices([table.address for table in self.tables])
        for table in self.tables:
            args += device_args(table.name, self.socket(table.name, run_dir), table.address, self._shares_slot(table))
        return args

    def close(self) -> None:
        """Gives back what the devices hold."""
        for device in self.devices.values():
            device.close()


def parse(text: str, file: Path) -> Machine:
    """The machine that a file's text describes.  ConfigError, one line for each mistake."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax(str(error), text), file=file) from error
    except RecursionError as error:
        raise ConfigError("is nested too deeply", file=file) from error
    return Machine(raw, file)


def _syntax(message: str, text: str) -> str:
    """tomllib's message, its line first, with what is written there."""
    message = _one_line(message)
    at = re.fullmatch(r"(.*) \(at (?:line ([0-9]+), column ([0-9]+)|end of document)\)", message)
    if at is None:
        return f"is no TOML: {message}"
    lines = text.splitlines() or [""]
    line = int(at[2] or len(lines))
    written = lines[line - 1].strip() if line <= len(lines) else ""
    return f"line {line}: {_short(written)}: is no TOML: {at[1][0].lower()}{at[1][1:]}"


def load(path: Path) -> Machine:
    """The machine that a file describes.  ConfigError, one line for each mistake."""
    try:
        # A byte order mark, as some editors leave it, is not the user's mistake.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"line {line}: is no UTF-8 text: save the file as UTF-8", file=path) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {getattr(error, 'strerror', None) or error}", file=path) from error
    if not text.strip():
        raise ConfigError('is empty: a machine file needs a [machine] table with name = "edu-demo"', file=path)
    return parse(text, path)
