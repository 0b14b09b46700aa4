"""The program that tries torch, CUDA and bitsandbytes, in a process of its own.

A native library that does not suit the processor or the driver can end its process: here that is an
answer, not the end of the examination. ``python -m budgetsearch.tools.doctor.probe cuda:0`` prints a line of
JSON for each question as soon as it is answered.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from budgetsearch.tools.doctor.check import describe
from budgetsearch.tools.doctor.step import ask_step

BACKENDS = ("cpu", "cuda", "xpu", "mps", "hpu")


def ask_torch(device: str) -> dict[str, Any]:
    """The version, and what the build is for."""
    import torch

    return {"version": torch.__version__, "built": torch.version.cuda}


def ask_cuda(device: str) -> dict[str, Any]:
    """How many cards torch sees, and whether the one in question computes."""
    import torch

    if not torch.cuda.is_available():
        return {"count": 0, "why": _why_no_cuda(torch)}
    found: dict[str, Any] = {"count": torch.cuda.device_count()}
    if device == "cpu":
        return found
    major, minor = torch.cuda.get_device_capability(device)
    found |= {"name": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}"}
    with torch.cuda.device(device):
        found["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        ones = torch.ones(64, 64, device=device)
        found["sum"] = (ones @ ones).sum().item()
    except RuntimeError as error:
        found["broken"] = describe(error)
    return found


def _why_no_cuda(torch: Any) -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return describe(error)
    return "it gives no reason"


def ask_bitsandbytes(device: str) -> dict[str, Any]:
    """The native library, the backends, and how well nf4 brings a tensor back on the device."""
    import bitsandbytes
    from bitsandbytes.cextension import lib

    # Where its library does not load, bitsandbytes keeps the reason and complains at the first call.
    native = vars(lib).get("_lib")
    if native is None and device != "cpu":
        return {"problem": f"its native library does not load: {vars(lib).get('error_msg')}"}
    return {
        "version": bitsandbytes.__version__,
        "library": os.path.basename(native._name) if native is not None else "",
        "backends": [name for name in BACKENDS if f"bitsandbytes.backends.{name}.ops" in sys.modules],
        "nf4_error": _nf4_error(device),
    }


def _nf4_error(device: str) -> float:
    """The largest error of a round trip, as a share of the largest value in its block of 64."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    back = dequantize_4bit(packed, state)
    largest = weight.abs().amax(dim=1, keepdim=True)
    return float(((back - weight).abs() / largest).max())


QUESTIONS: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "torch": ask_torch,
    "cuda": ask_cuda,
    "bitsandbytes": ask_bitsandbytes,
    "step": ask_step,
}


def main(device: str) -> None:
    """Answer every question on standard output; what the libraries print goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for name, question in QUESTIONS.items():
        try:
            answer = question(device)
        except Exception as error:  # whatever goes wrong in a foreign library is the answer
            answer = {"problem": describe(error)}
        print(json.dumps({name: answer}), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
