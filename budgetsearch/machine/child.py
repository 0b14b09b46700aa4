"""How Python is started anew: what lies in the user's working folder is never imported by a child process."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

SAFE_PATH = "PYTHONSAFEPATH"
"""In the environment: no Python that is started puts its working folder on its path, nor those it starts."""
PR_SET_PDEATHSIG = 1
NEUTRAL = "/"
"""The working folder of children: an empty entry of PYTHONPATH means it, and nobody but root writes there."""


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module: without ``-P`` a pip.py beside the user's data would be it."""
    return script("-m", module, *arguments)


def script(path: str, *arguments: str) -> list[str]:
    """The command that runs a file by its path, importing nothing that lies beside it."""
    return [sys.executable, "-P", path, *arguments]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for a child in ``NEUTRAL``: PYTHONPATH names the folders that it named here,
    but for the working folder that an empty entry stands for."""
    named = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    path = {"PYTHONPATH": os.pathsep.join(named)} if named else {}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, **path, SAFE_PATH: "1", **(more or {})}


def die_with_parent() -> None:
    """On Linux the kernel ends this process when its parent dies, even while it holds the GIL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
