from pathlib import Path

import psutil
import torch

from tune.trial.worker import machine_usage


def test_the_machine_is_reported_in_the_units_of_mlflows_tab(tmp_path: Path) -> None:
    usage = machine_usage(torch.device("cpu"), tmp_path / "not/there/yet")
    assert all(name.startswith("system/") for name in usage)
    total = psutil.virtual_memory().total / 1e6
    assert 0 < usage["system/system_memory_usage_megabytes"] < total
    assert not [name for name in usage if "gpu" in name]
    for name, value in usage.items():
        assert 0 <= value <= (100 if name.endswith("_percentage") else float("inf"))
    assert usage["system/disk_available_megabytes"] <= psutil.disk_usage(str(tmp_path)).total / 1e6
