"""A headless Chromium, driven over its DevTools protocol through two pipes: no port, no driver, no further package."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--remote-debugging-pipe", "--hide-scrollbars"),
)
_KEY_CODES = {"ArrowRight": 39, "ArrowLeft": 37, "Escape": 27}


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser with a profile of its own. A context manager.

    Attributes:
        errors: exceptions and error messages of the page's scripts so far.
        requests: addresses that pages have asked for so far.
    """

    def __init__(self, patience_s: float = 60.0) -> None:
        self.patience_s = patience_s
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._count, self._received, self._session = 0, b"", None

    def __enter__(self) -> "Browser":
        (its_in, self._out), (self._in, its_out) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_in, its_out)]  # never 3 or 4 themselves
        command = [find_browser(), *OPTIONS, f"--user-data-dir={self._profile.name}", "about:blank"]
        connect = f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
        self._process = subprocess.Popen(
            ["bash", "-c", connect, "browser", *command], pass_fds=theirs, stderr=subprocess.DEVNULL
        )
        for end in (its_in, its_out, *theirs):
            os.close(end)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *exception: Any) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol, and its result. Raises RuntimeError, TimeoutError."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._wait(lambda reply: reply.get("id") == self._count)

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False, fragment: str = "") -> None:
        """Load a file, in a window of this size; `fragment` is put behind its address."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=page.resolve().as_uri() + fragment)
        while not self.run("document.readyState === 'complete' && location.protocol === 'file:'"):
            time.sleep(0.01)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited. Raises RuntimeError if it throws."""
        reply = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in reply:
            raise RuntimeError(reply["exceptionDetails"]["exception"].get("description"))
        return reply["result"].get("value")

    def text(self, selector: str) -> str:
        """The text that a reader sees of the first such element."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.innerText)")

    def choose(self, name: str, value: str) -> None:
        """Choose an entry of a select element."""
        select_it = f"document.querySelector('select[name=\"{name}\"]')"
        self.run(f"{{ const s = {select_it}; s.value = {json.dumps(value)}; s.dispatchEvent(new Event('change')); }}")

    def hover(self, selector: str, index: int = 0) -> None:
        self._mouse("mouseMoved", *self._middle(selector, index))

    def click(self, selector: str, index: int = 0) -> None:
        place = self._middle(selector, index)
        for kind in ("mousePressed", "mouseReleased"):
            self._mouse(kind, *place, button="left", clickCount=1)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {"windowsVirtualKeyCode": _KEY_CODES[key]}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def _mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def _middle(self, selector: str, index: int) -> tuple[float, float]:
        found = f"document.querySelectorAll({json.dumps(selector)})[{index}]"
        box = self.run(
            f"(() => {{ const it = {found}; it.scrollIntoView({{block: 'nearest'}});"
            " const box = it.getClientRects()[0]; return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        return box[0], box[1]

    def _wait(self, wanted: Any) -> dict[str, Any]:
        deadline = time.monotonic() + self.patience_s
        while True:
            while b"\0" in self._received:
                message, _, self._received = self._received.partition(b"\0")
                reply = json.loads(message)
                self._note(reply)
                if wanted(reply):
                    if "error" in reply:
                        raise RuntimeError(reply["error"]["message"])
                    return reply["result"]
            if not select.select([self._in], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError(f"the browser did not answer in {self.patience_s:g} s")
            data = os.read(self._in, 1 << 20)
            if not data:
                raise RuntimeError(f"the browser ended with status {self._process.wait()}")
            self._received += data

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(params["exceptionDetails"].get("exception", {}).get("description", "?"))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
