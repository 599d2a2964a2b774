import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dskd.device import computing_device, constant, resident, to_device, to_host


@pytest.mark.parametrize("wanted", ["tpu", "cuda:", "cuda0", "CPU", ""])
def test_an_unknown_device_is_refused(wanted: str) -> None:
    with pytest.raises(ValueError, match="--device must be auto, cpu, cuda or cuda:N"):
        computing_device(wanted)


@pytest.mark.parametrize(("wanted", "gpus"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_is_not_there_is_refused(wanted: str, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=f"--device {wanted}: this machine has {gpus or 'no'} usable GPUs"):
        computing_device(wanted)


@pytest.mark.parametrize(("gpus", "expected"), [(0, "cpu"), (1, "cuda")])
def test_auto_takes_a_gpu_where_there_is_one(gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert computing_device("auto") == torch.device(expected)


def test_choosing_a_device_turns_reduced_float32_off() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        computing_device("cpu")
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_rows_of_a_read_only_file_are_a_copy(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    values = np.arange(12.0).reshape(4, 3)
    np.save(tmp_path / "table.npy", values)
    table = np.load(tmp_path / "table.npy", mmap_mode="r")
    cpu = torch.device("cpu")
    np.testing.assert_array_equal(to_device(cpu, table, np.array([2, 0])).numpy(), values[[2, 0]])
    to_device(cpu, table, slice(1, 3)).zero_()
    np.testing.assert_array_equal(table, values)
    assert not list(recwarn)


def test_a_cpu_keeps_nothing_resident_and_reads_what_is() -> None:
    values, cpu = np.arange(12.0).reshape(4, 3), torch.device("cpu")
    assert resident(cpu, values) is values
    there = torch.from_numpy(values)
    np.testing.assert_array_equal(to_device(cpu, there, np.array([2, 0])).numpy(), values[[2, 0]])
    np.testing.assert_array_equal(to_device(cpu, there, slice(1, 3)).numpy(), values[1:3])
    np.testing.assert_array_equal(to_host(there)(), values)
    assert constant(cpu, tuple, (1.0, 2.0)) is not constant(cpu, tuple, (1.0, 2.0))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_that_large_tensors_free_is_there_for_the_next_ones() -> None:
    def step() -> None:
        held = [torch.ones(12_000_000) for _ in range(4)]  # 48 MB each, more than glibc keeps by itself
        del held

    computing_device("cpu")
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step()
    # A tensor has 11,700 pages. Of what a step frees, not all is found again: glibc looks for room to align it.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 10 * 11_700, "of 16 tensors"
