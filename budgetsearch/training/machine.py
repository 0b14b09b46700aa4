"""What decides how sums round here: two trainings can only be equal to the bit where all of it is."""

from __future__ import annotations

import os

import torch

from budgetsearch.machine.host import processor
from budgetsearch.training.fused import PACKAGE, refused, version

FLAGS = (
    "ATEN_CPU_CAPABILITY",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
)
"""Variables that choose other kernels, where they are set."""


def computed_on(device: str) -> dict[str, str]:
    """Processor, vector unit, threads and torch of this process, and its card if it uses one."""
    found = {
        "torch": str(torch.__version__),
        "processor": processor(),
        "vector unit": str(torch.backends.cpu.get_cpu_capability()),
        "threads": str(torch.get_num_threads()),
    }
    libraries = {"MKL": torch.backends.mkl, "oneDNN": torch.backends.mkldnn}
    found["libraries"] = ", ".join(name for name, part in libraries.items() if part.is_available()) or "none"
    flags = [f"{name}={os.environ[name]}" for name in FLAGS if os.environ.get(name)]
    if flags:
        found["flags"] = " ".join(flags)
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        found["card"] = f"{properties.name} (compute capability {properties.major}.{properties.minor})"
        found["CUDA"] = str(torch.version.cuda)
        found["fused kernels"] = "none" if refused(device) else f"{PACKAGE} {version()}"
        found["cuDNN"] = str(torch.backends.cudnn.version())
    return found
