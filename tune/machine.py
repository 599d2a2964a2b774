"""How busy the machine of a trial is, under the names of MLflow's system-metrics tab."""

import os
from pathlib import Path

import psutil
import torch

PREFIX = "system/"


def machine_usage(device: torch.device, folder: Path) -> dict[str, float]:
    """Use of CPUs (mean since the last call in this process), memory, the disk of `folder`, and of `device` if a GPU.

    All of the machine, whoever uses it. A GPU's load is left out where its driver does not tell it.
    """
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(_existing(folder))
    usage = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / 1e6,
    }
    if device.type == "cuda":
        usage |= _gpu_usage(device)
    return {PREFIX + name: float(value) for name, value in usage.items()}


def _existing(folder: Path) -> str:
    return str(next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place)))


def _gpu_usage(device: torch.device) -> dict[str, float]:
    name = f"gpu_{device.index if device.index is not None else torch.cuda.current_device()}"
    free, total = torch.cuda.mem_get_info(device)
    usage = {
        f"{name}_memory_usage_megabytes": (total - free) / 1e6,
        f"{name}_memory_usage_percentage": 100 * (total - free) / total,
    }
    try:
        usage[f"{name}_utilization_percentage"] = torch.cuda.utilization(device)
    except (ModuleNotFoundError, RuntimeError):  # no NVML in this container or partition
        return usage
    return usage
