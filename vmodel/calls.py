"""Commands of a running server's control socket that call methods of models; see vmodel.device.outside."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from typing import Any

from vmodel.control import Command
from vmodel.device import PciDevice
from vmodel.device.outside import CallTimeout, OutsideError, ResultError, call_json, device_of, methods_of, signature_of
from vmodel.errors import ConfigError
from vmodel.logs import limited
from vmodel.mistakes import exception_line

log = limited(__name__)

#: Calls at a time, and the longest that one may wait, in seconds.
MOST_CALLS, LONGEST = 8, 3600.0


def commands(devices: Mapping[str, PciDevice]) -> dict[str, Command]:
    """The commands by name; they may wait for a device.  Each may raise ConfigError, whose text is for the user."""
    free = threading.BoundedSemaphore(MOST_CALLS)

    def call(request: Mapping[str, Any]) -> dict[str, str]:
        method, arguments, named, seconds = (request.get(key) for key in ("method", "arguments", "named", "seconds"))
        if not isinstance(method, str) or not isinstance(arguments, list) or not isinstance(named, dict):
            raise ConfigError("a call needs a method, a list of arguments, and a table of named ones")
        if not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST:
            raise ConfigError(f"a call may take more than 0 and at most {LONGEST:g} s, not {seconds!r}")
        if not free.acquire(blocking=False):
            raise ConfigError(f"{MOST_CALLS} calls have not returned yet")
        try:
            return _call(*device_of(devices, method), arguments, named, seconds)
        except OutsideError as error:
            raise ConfigError(str(error)) from error
        finally:
            free.release()

    return {"call": call, "call.list": lambda _: listed(devices)}


def _call(device: PciDevice, name: str, arguments: list[Any], named: dict[str, Any], seconds: float) -> dict[str, str]:
    """{"json": the result}, or {"failed": why}: the model's exception with its line, or that it does not return."""
    try:
        return {"json": call_json(device, name, arguments, named, seconds=seconds)}
    except OutsideError:
        raise
    except (CallTimeout, ResultError) as error:
        return {"failed": str(error)}
    except BaseException as error:  # the model's own, which may even be SystemExit
        log.warning("%s: %s failed for a caller from outside", device.name, name, exc_info=error)
        return {"failed": f"{device.name}.{name}: {exception_line(error)}"}


def listed(devices: Mapping[str, PciDevice]) -> list[dict[str, str]]:
    """The methods for the outside of all devices: "call", as uart0.feed(text: str), and the first line of "doc"."""
    return [
        {
            "call": f"{name}.{signature_of(method, function)}",
            "doc": (inspect.getdoc(function) or "").partition("\n")[0],
        }
        for name, device in devices.items()
        for method, function in methods_of(type(device)).items()
    ]
