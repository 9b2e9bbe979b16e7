"""Loads the class that a machine file's `model` names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from vmodel.device import PciDevice
from vmodel.devices import BUILTIN, IOMMUS
from vmodel.devices.iommu import IommuDevice
from vmodel.errors import ConfigError
from vmodel.mistakes import exception_line, guess

_OTHER_MODELS = '"path/file.py:Class", or "package.module:Class"'


def load_model(name: str, base: Path | None = None) -> type[PciDevice]:
    """Loads the class that a `model` key names; paths are relative to `base`.  ConfigError: there is none."""
    target = BUILTIN.get(name, name)
    source, colon, class_name = target.rpartition(":")
    if not colon:
        if name.endswith(".py"):
            raise ConfigError(f'model {name!r}: lacks the class, as "{name}:Class"')
        close = guess(name, list(BUILTIN))
        raise ConfigError(
            f"unknown model {name!r}: {f'did you mean {close!r}? ' if close else ''}"
            f"Built-ins are {', '.join(BUILTIN)}; else {_OTHER_MODELS}"
        )
    if not source.strip(".") or not class_name.isidentifier():
        raise ConfigError(f"model {name!r}: must be a built-in ({', '.join(BUILTIN)}), {_OTHER_MODELS}")
    if not source.endswith(".py") and not all(part.isidentifier() for part in source.split(".")):
        raise ConfigError(f"model {name!r}: must be a built-in ({', '.join(BUILTIN)}), {_OTHER_MODELS}")
    module = load_source(f"model {name!r}", source, base)
    model = getattr(module, class_name, None)
    if model is None:
        classes = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, PciDevice)]
        classes = [k for k in classes if k != "PciDevice"]
        close = guess(class_name, classes)
        there = f"did you mean {close!r}?" if close else f"models there: {', '.join(classes) or 'none'}"
        raise ConfigError(f"model {name!r}: no class {class_name!r} in {source}; {there}")
    if not isinstance(model, type) or not issubclass(model, PciDevice):
        raise ConfigError(f"model {name!r}: {class_name} must be a class derived from vmodel.device.PciDevice")
    if not hasattr(model, "vendor_id"):
        raise ConfigError(f"model {name!r}: {class_name} must declare vendor_id, device_id and class_code")
    return model


def load_served(kind: str) -> type[IommuDevice]:
    """The model by which a guest drives an IOMMU of this kind."""
    source, _, name = IOMMUS[kind].partition(":")
    model: type[IommuDevice] = getattr(importlib.import_module(source), name)
    return model


def load_source(what: str, source: str, base: Path | None = None) -> ModuleType:
    """Loads the module "path/file.py", relative to `base`, or "package.module".  ConfigError: begins with `what`."""
    return _load_file(what, (base or Path()) / source) if source.endswith(".py") else _load_module(what, source)


def _load_module(what: str, source: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{source}.".startswith(f"{error.name}."):
            raise ConfigError(f"{what}: there is no module {error.name!r}") from error
        raise _load_error(what, error) from error


def _load_file(what: str, path: Path) -> ModuleType:
    if "\0" in str(path) or not path.is_file():
        raise ConfigError(f"{what}: there is no file {str(path)!r}")
    path = path.resolve()
    # A file is loaded once, so that two devices of one model have the same class.
    alias = f"vmodel_user_{path.stem}_{abs(hash(path)):x}"
    if alias in sys.modules:
        return sys.modules[alias]
    spec = importlib.util.spec_from_file_location(alias, path)
    assert spec is not None and spec.loader is not None  # as the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    # As of a script, what is beside it can be imported; last, so that nothing there hides a module of Python's.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[alias]
        if isinstance(error, Exception | SystemExit):
            raise _load_error(what, error) from error
        raise
    return module


def _load_error(what: str, error: BaseException) -> ConfigError:
    return ConfigError(f"{what} cannot be loaded: {exception_line(error)}")
