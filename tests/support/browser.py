"""A real Chromium, spoken to through its own pipes: no driver, no port."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
INSTALL_SECONDS = 300
CONTRASTS = """(() => {
  const light = (colour) => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(c => c / 255);
    const linear = parts.map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const page = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll("%s")].map(one => {
    const text = light(getComputedStyle(one).color);
    return (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05);
  });
})()"""
WAIT_SECONDS = 60.0
"""A page on a busy machine may take so long."""


def find_browser() -> str:
    """The browser's program; as root of a Debian it is installed once. Without one the test is skipped."""
    found = _which()
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        with (Path(tempfile.gettempdir()) / "install-chromium.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes must not install at once
            found = _which() or _install()
    if found is None:
        pytest.skip("no Chromium here, and it cannot be installed (apt-get install chromium)")
    return found


def _which() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def _install() -> str | None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": False}
    install = "apt-get install -y -q --no-install-recommends chromium"
    command = f"apt-get update -q && DEBIAN_FRONTEND=noninteractive {install}"
    try:
        subprocess.run(["sh", "-c", command], timeout=INSTALL_SECONDS, **quiet)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        return None
    return _which()


@dataclass
class Page:
    """One page in a browser of its own."""

    process: subprocess.Popen[bytes]
    to_browser: Any
    from_browser: Any
    session: str = ""
    calls: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    """Everything that the browser told without being asked."""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol; returns its result."""
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.to_browser.write(json.dumps(message).encode() + b"\0")
        self.to_browser.flush()
        while True:
            answer = self.read()
            if answer.get("id") == self.calls:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self.events.append(answer)

    def read(self) -> dict[str, Any]:
        """The browser's next message; its messages end with a zero byte."""
        found = bytearray()
        while (byte := self.from_browser.read(1)) != b"\0":
            assert byte, "the browser has gone"
            found += byte
        return dict(json.loads(found))

    def wait_for(self, method: str) -> None:
        """Until the browser has told of an event."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self.read())

    def open(self, place: Path | str, width: int = 1280, height: int = 900) -> None:
        """Load a file or an address in a window of this size; below 600 pixels it is a phone."""
        self.events.clear()
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone},
        )
        self.call("Page.navigate", url=place if isinstance(place, str) else place.absolute().as_uri())
        self.wait_for("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        given = {"expression": script, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", **given)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for_text(self, *wanted: str) -> str:
        """The page's text, titles of drawings included, once it holds everything that is wanted."""
        # Text in drawings is no innerText.
        script = (
            "document.body.innerText + '\\n' + "
            "[...document.querySelectorAll('svg text')].map(t => t.textContent).join('\\n')"
        )
        return wait_until(lambda: str(self.run(script)), lambda text: all(w in text for w in wanted), wanted)

    def requests(self) -> list[str]:
        """Every address that the page asked for."""
        sent = [e["params"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [str(one["request"]["url"]) for one in sent]

    def complaints(self) -> list[str]:
        """Errors that scripts and the content security policy caused."""
        thrown = [e for e in self.events if e.get("method") == "Runtime.exceptionThrown"]
        logged = [e for e in self.events if e.get("method") == "Log.entryAdded"]
        return [json.dumps(e["params"])[:500] for e in (*thrown, *logged)]

    def screenshot(self, path: Path, *, whole: bool = True) -> Path:
        """What it looks like, as PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def like_dark(self, wanted: bool) -> None:
        """Be on a machine whose user likes pages dark, or not."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def contrasts(self, selector: str) -> list[float]:
        """The contrast of each of these elements' text with the page, 1 to 21 (WCAG)."""
        return list(self.run(CONTRASTS % selector))

    def print_pdf(self, path: Path) -> Path:
        """On A4, with backgrounds."""
        paper = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True, "preferCSSPageSize": True}
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", **paper)["data"]))
        return path


def wait_until(look: Callable[[], str], enough: Callable[[str], bool], wanted: object = "") -> str:
    """What ``look`` sees, once it is enough."""
    until = time.monotonic() + WAIT_SECONDS
    while not enough(found := look()):
        assert time.monotonic() < until, f"{wanted} did not come; there is:\n{found}"
        time.sleep(0.1)
    return found


@contextmanager
def browser_page() -> Iterator[Page]:
    """A fresh browser with an empty profile; it is gone afterwards."""
    program = find_browser()
    child_reads, we_write = os.pipe()
    we_read, child_writes = os.pipe()
    options = [
        "--headless=new",
        "--disable-gpu",
        "--no-first-run",
        "--hide-scrollbars",
        "--disable-dev-shm-usage",
    ]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The protocol's pipes are 3 and 4 in the child.
        shell = f'exec "$0" "$@" 3<&{child_reads} 4>&{child_writes}'
        process = subprocess.Popen(
            ["bash", "-c", shell, program, *options, "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            pass_fds=(child_reads, child_writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(child_reads)
        os.close(child_writes)
        try:
            with os.fdopen(we_write, "wb") as write, os.fdopen(we_read, "rb") as read:
                page = Page(process, write, read)
                target = page.call("Target.createTarget", url="about:blank")["targetId"]
                page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
                for domain in ("Page", "Runtime", "Network", "Log"):
                    page.call(f"{domain}.enable")
                yield page
        finally:
            process.kill()
            process.wait()
