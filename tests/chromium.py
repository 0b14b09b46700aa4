"""A real headless Chromium: Debian's package, installed where that can be done, driven by its own driver."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BINARY, DRIVER = "chromium", "chromedriver"
INSTALL_SECONDS = 300
WAIT_SECONDS = 60.0
"""A page on a busy machine may take so long."""


def open_browser(width: int = 1400, height: int = 1500) -> Any:
    """A browser without a window; skips the test where there is none and none can be installed."""
    webdriver = pytest.importorskip("selenium.webdriver")
    missing = _install()
    if missing:
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which(BINARY))
    for flag in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses root with its sandbox
    options.add_argument(f"--window-size={width},{height}")
    service = webdriver.ChromeService(executable_path=str(shutil.which(DRIVER)))
    return webdriver.Chrome(options=options, service=service)


def _install() -> str | None:
    """Install Chromium once, whichever test process comes first; returns why there is none."""
    lock = Path(tempfile.gettempdir()) / f"budgetsearch-chromium-{os.geteuid()}.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if shutil.which(BINARY) and shutil.which(DRIVER):
            return None
        if os.geteuid() or not shutil.which("apt-get"):
            return "no Chromium here, and only root on a Debian system can install it"
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        packages = ["install", "-y", "-q", "--no-install-recommends", "chromium", "chromium-driver"]
        try:
            for words in (["update", "-q"], packages):
                subprocess.run(
                    ["apt-get", *words], env=environment, check=True, timeout=INSTALL_SECONDS,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
        except (subprocess.SubprocessError, OSError) as error:
            return f"no Chromium here, and it cannot be installed: {error}"
        return None if shutil.which(BINARY) and shutil.which(DRIVER) else "the package has no chromium"


def wait_for_text(browser: Any, *wanted: str) -> str:
    """The page's text, titles of plots included, once it holds everything that is wanted."""
    return wait_until(lambda: _text(browser), lambda text: all(word in text for word in wanted), wanted)


def _text(browser: Any) -> str:
    """What can be read on the page; text in drawings is no ``innerText``."""
    script = (
        "return document.body.innerText + '\\n' + "
        "[...document.querySelectorAll('svg text')].map(t => t.textContent).join('\\n')"
    )
    return str(browser.execute_script(script))


def wait_until(look: Callable[[], str], enough: Callable[[str], bool], wanted: object = "") -> str:
    """What ``look`` sees, once it is enough."""
    until = time.monotonic() + WAIT_SECONDS
    while not enough(found := look()):
        assert time.monotonic() < until, f"{wanted} did not come; there is:\n{found}"
        time.sleep(0.1)
    return found
