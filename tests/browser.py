"""Drives a headless Chromium over a pipe, by its DevTools protocol, and keeps what it logs and what it asks for."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NOT_HERE = "Chromium is not installed here (Debian: apt-get install -y chromium)"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
).split()


class Browser:
    """A page of a browser of its own, which ends with the context.

    Attributes:
        logged: what the page wrote to the console, errors of scripts, and what the browser refused, as texts.
        asked_for: the addresses of all requests.
    """

    def __enter__(self) -> "Browser":
        self.logged, self.asked_for, self._next, self._buffer, self._events = [], [], 1, b"", []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        redirected = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", *command]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(redirected, pass_fds=(to_browser, from_browser), **quiet)
        os.close(to_browser)
        os.close(from_browser)
        os.set_blocking(self._from, False)
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def call(self, method, **params):
        """Call a method of the protocol, and return its result."""
        number, self._next = self._next, self._next + 1
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def wait_for(self, event, seconds=60):
        """Wait until an event has come since the last call of this."""
        end = time.monotonic() + seconds
        while event not in self._events:
            assert time.monotonic() < end, f"no {event}"
            self._read()
        self._events.clear()

    def open(self, file):
        """Load a file, and wait until all is there."""
        self._events.clear()
        self.call("Page.navigate", url=Path(file).absolute().as_uri())
        self.wait_for("Page.loadEventFired")

    def value(self, expression):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def look(self, width, height=900, scheme="light", media="screen"):
        """Look at the page as on a screen of this size, with this color scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        feature = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=feature)

    def screenshot(self, file):
        """Write what is seen, the whole page, as PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        Path(file).write_bytes(base64.b64decode(data))

    def pdf(self, file):
        """Print the page."""
        Path(file).write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"]))

    def _read(self, seconds=120):
        """The next message of the browser."""
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            assert time.monotonic() < end and self._process.poll() is None, "the browser does not answer"
            try:
                self._buffer += os.read(self._from, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        method, params = message.get("method"), message.get("params", {})
        if method is not None:
            self._events.append(method)
        if method == "Network.requestWillBeSent":
            self.asked_for.append(params["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.logged.append(json.dumps(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.logged.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.logged.append(params["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.logged.append(f"dialog: {params['message']}")
            self._session_call_later = True
        return message
