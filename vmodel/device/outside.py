"""Methods of a model that the outside may call, by `vmodel call` and in tests.

```python
class Uart(PciDevice):
    @outside
    def feed(self, text: str) -> int:
        \"\"\"Receives characters; returns how many there was room for.\"\"\"
```

A call runs on the device's thread, like a hook.  Arguments are checked against the annotations, as pydantic does.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import pydantic

from vmodel.errors import VmodelError
from vmodel.mistakes import guess, one_line
from vmodel.regs import RegisterError
from vmodel.threads import place

if TYPE_CHECKING:
    from vmodel.device import PciDevice

#: For pytest: what fails here is shown at the line of the test that called.
__tracebackhide__ = True

#: Seconds for a call to return.
TIMEOUT = 10.0
_MARK = "_vmodel_outside"
_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")


class OutsideError(VmodelError):
    """A call from outside is wrong: no such method, or arguments that it does not take."""


class ResultError(VmodelError):
    """The result of a call from outside is no JSON."""


class CallTimeout(VmodelError, TimeoutError):
    """A call from outside did not return in time, or the device's server stopped before it began."""


def outside(method: _F) -> _F:
    """Marks a method as one that the outside may call.  RegisterError: it is no method, or it is asynchronous."""
    if not inspect.isfunction(method):
        raise RegisterError(f"@outside is for methods, not for {method!r}: put it above the other decorators of a hook")
    if inspect.iscoroutinefunction(method) or inspect.isgeneratorfunction(method):
        raise RegisterError(f"@outside: {method.__qualname__} is a coroutine or generator, and would not run")
    setattr(method, _MARK, True)
    return method


def methods_of(model: type[PciDevice]) -> dict[str, Callable[..., Any]]:
    """The methods that the outside may call, by name.  A method that overrides a marked one is marked, too."""
    found: dict[str, Callable[..., Any]] = {}
    for name in dir(model):
        if any(hasattr(vars(base).get(name), _MARK) for base in model.__mro__):
            found[name] = getattr(model, name)
    return found


def signature_of(name: str, method: Callable[..., Any]) -> str:
    """How a method is called, as "feed(text: str) -> int"."""
    shown = inspect.signature(method)
    text = str(shown.replace(parameters=list(shown.parameters.values())[1:]))
    # Annotations that are strings, as with `from __future__ import annotations`, have quotes.
    return f"{name}{text.replace(chr(39), '')}"


def device_of(devices: Mapping[str, PciDevice], path: str) -> tuple[PciDevice, str]:
    """The device and the method's name of "uart0.feed".  OutsideError: no such device."""
    name, dot, method = path.partition(".")
    if not dot or not method:
        raise OutsideError(f"{path!r}: must name a device and a method, as uart0.feed")
    if name not in devices:
        close = guess(name, list(devices))
        known = f"did you mean {close!r}?" if close else f"known are {', '.join(devices)}"
        raise OutsideError(f"no device is called {name!r}: {known}")
    return devices[name], method


def call(
    device: PciDevice,
    name: str,
    arguments: Sequence[Any] = (),
    named: Mapping[str, Any] = {},
    *,
    seconds: float = TIMEOUT,
) -> Any:
    """Calls a method for the outside on the device's thread; returns its result, or raises what it raises.

    OutsideError: there is no such method, or the arguments are wrong.  CallTimeout: it has not returned in `seconds`.
    """
    bound = _prepared(device, name, arguments, named)
    return _on_thread(device, name, bound, seconds)


def call_json(
    device: PciDevice, name: str, arguments: Sequence[Any], named: Mapping[str, Any], *, seconds: float = TIMEOUT
) -> str:
    """As `call`; the result is JSON text, made on the device's thread.  ResultError: it is not JSON."""
    bound = _prepared(device, name, arguments, named)

    def run() -> str:
        result = bound()
        try:
            return json.dumps(result, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ResultError(f"{device.name}.{name}: the result is not JSON: {one_line(error)}") from None

    return _on_thread(device, name, run, seconds)


def _prepared(device: PciDevice, name: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Callable[[], Any]:
    """The call, with checked arguments.  OutsideError."""
    methods = methods_of(type(device))
    if name not in methods:
        known = ", ".join(methods)
        if not known:
            raise OutsideError(f"{device.name} has no methods for the outside: a model marks them with @outside")
        close = guess(name, list(methods))
        raise OutsideError(
            f"{device.name} has no method {name!r} for the outside: "
            + (f"did you mean {close!r}?" if close else f"known are {known}")
        )
    method = methods[name]

    @functools.wraps(method)
    def taken(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    where = f"{device.name}.{signature_of(name, method)}"
    try:
        taken.__annotations__ = get_type_hints(method, include_extras=True)
        taken.__annotations__.pop("return", None)
        args, kwargs = pydantic.validate_call(taken)(device, *arguments, **named)
    except pydantic.ValidationError as error:
        raise OutsideError(f"{where}: {_wrong(method, error)}") from None
    except (NameError, pydantic.errors.PydanticUserError) as error:
        raise OutsideError(f"{where}: an annotation cannot be understood: {one_line(error)}") from error
    return functools.partial(getattr(device, name), *args[1:], **kwargs)


def _wrong(method: Callable[..., Any], error: pydantic.ValidationError) -> str:
    """What is wrong with the arguments."""
    names = list(inspect.signature(method).parameters)
    texts = []
    for detail in error.errors(include_url=False):
        first, *rest = detail["loc"]
        if isinstance(first, int):
            first = names[first] if first < len(names) else f"argument {first}"
        where = "".join([str(first), *(f"[{part!r}]" for part in rest)])
        texts.append(f"{where}: {one_line(detail['msg'])}")
    return "; ".join(texts)


def _on_thread(device: PciDevice, name: str, run: Callable[[], _T], seconds: float) -> _T:
    backend = device.backend
    if backend.owner.is_here():
        return run()
    future: Future[_T] = Future()

    def carry_out() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(run())
        except BaseException as error:  # even SystemExit is the caller's
            future.set_exception(error)

    future.add_done_callback(lambda _: backend.pause.look())
    device.post(carry_out)
    backend.pause.wait(seconds, future.done)
    if not future.done():
        what = f"{device.name}.{name}"
        if not future.cancel():
            raise CallTimeout(f"{what} has not returned in {seconds:g} s: it is in {place(backend.owner.thread)}")
        busy = f": its thread is in {place(backend.owner.thread)}" if backend.owner.thread else ""
        raise CallTimeout(f"{what} has not begun in {seconds:g} s, or the server has stopped{busy}")
    return future.result()
