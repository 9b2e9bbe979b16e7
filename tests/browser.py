"""Headless Chromium, driven over its pipe by the DevTools protocol: what a page is once its script has run."""

from __future__ import annotations

import base64
import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vmodel.guest.artifacts import find_browser
from vmodel.patience import patience

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--no-zygote",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "about:blank",
]
#: It reads commands from its descriptor 3, and writes answers to 4.
_MOVE = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD_CLOEXEC, 10) for end in sys.argv[1:3]]
for end, wanted in zip(ends, (3, 4)):
    os.dup2(end, wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page; a context manager that ends the browser."""

    def __init__(self, profile: Path, width: int = 1350, height: int = 1000) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        flags = [*_FLAGS, f"--user-data-dir={profile.absolute()}", f"--window-size={width},{height}"]
        line = [sys.executable, "-c", _MOVE, str(theirs_in), str(theirs_out), str(find_browser()), *flags]
        with (profile.parent / "browser.log").open("wb") as log:
            self._process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[theirs_in, theirs_out]
            )
        os.close(theirs_in)
        os.close(theirs_out)
        self._left = b""
        self._count = 0
        self._session: str | None = None
        #: What the page's script has said: errors, and what the policy has kept from being fetched.
        self.said: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + patience(60)
        while (answer := self._message(deadline)).get("id") != self._count:
            self._event(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _message(self, deadline: float) -> dict[str, Any]:
        """The browser's next message, until `deadline` (monotonic)."""
        while b"\0" not in self._left:
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self._in], [], [], left)[0]
            piece = os.read(self._in, 1 << 16) if ready else b""
            assert piece, "the browser does not answer: see browser.log"
            self._left += piece
        text, _, self._left = self._left.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def _event(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.said.append(str(params["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded":
            self.said.append(params["entry"]["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, path: Path, fragment: str = "") -> None:
        """Shows a file, and waits until it has been loaded."""
        self.call("Page.navigate", url=f"{path.absolute().as_uri()}{fragment}")
        deadline = time.monotonic() + patience(60)
        while True:
            message = self._message(deadline)
            self._event(message)
            if message.get("method") == "Page.loadEventFired":
                return

    def js(self, expression: str) -> Any:
        """What an expression gives, as plain data."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def media(self, media: str = "", **features: str) -> None:
        """As if it were printed, or dark."""
        wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", media=media, features=wanted)

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """As it would be printed."""
        return base64.b64decode(self.call("Page.printToPDF")["data"])

    def __enter__(self) -> Self:
        try:
            self._attach()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _attach(self) -> None:
        pages = self.call("Target.getTargets")["targetInfos"]
        page = next(page for page in pages if page["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._out)  # it ends when nobody commands it
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)


def luminance(colour: str) -> float:
    """Relative, as WCAG 2.1 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def once(condition: str, then: str = "true") -> str:
    """A promise in JavaScript of an expression's value, as soon as a condition holds."""
    return f"new Promise(done => {{ const look = () => {condition} ? done({then}) : setTimeout(look, 20); look(); }})"


#: Each pair of colours of text and of what is behind it, once, with an element that has it.
_COLOURS = """(selector => {
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (!colour.endsWith(", 0)")) return colour;
        }
        return "rgb(255, 255, 255)";
    };
    const found = {};
    for (const element of document.querySelectorAll(selector)) {
        const colours = [getComputedStyle(element).color, behind(element)];
        if (colours.every(colour => colour.startsWith("rgb("))) found[colours] = [...colours, element.outerHTML];
    }
    return Object.values(found);
})"""


def check_contrast(browser: Browser, selector: str, pairs: int) -> None:
    """Text stands out against what is behind it: by WCAG 2.1, 4.5 to 1.  There are at least `pairs` of colours."""
    found = browser.js(f"{_COLOURS}({json.dumps(selector)})")
    assert len(found) >= pairs
    for ink, paper, what in found:
        assert contrast(ink, paper) >= 4.5, (ink, paper, what[:80])
