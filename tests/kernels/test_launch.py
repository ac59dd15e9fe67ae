"""What the CUDA driver is told: a driver that only notes it down takes the real one's place."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from barlow.kernels import build, launch
from barlow.kernels.launch import Kernels

DRIVER = r"""
#include <cstring>
extern "C" {
int depth, pushed, loaded, launches, allowed, code;
unsigned grid, block, shared;
void* stream;
char module_bytes[8], name[64];
float number;
void* address;
long long count;
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)0x1234567890; return device != 1; }
int cuDeviceGetAttribute(int* value, int which, int) { *value = which == 97 ? 232448 : 0; return 0; }
int cuCtxPushCurrent_v2(void* context) { ++depth, ++pushed; return context != (void*)0x1234567890; }
int cuCtxPopCurrent_v2(void**) { --depth; return 0; }
int cuModuleLoadData(void** module, const void* image) {
    std::memcpy(module_bytes, image, 8), *module = (void*)7, ++loaded;
    if (code) return code;
    return depth != 1;
}
int cuModuleGetFunction(void** function, void* module, const char* named) {
    std::strcpy(name, named), *function = (void*)0x9876543210;
    return module != (void*)7;
}
int cuFuncSetAttribute(void*, int which, int value) { allowed = value; return which != 8; }
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c,
                   unsigned bytes, void* on, void** parameters, void** extra) {
    ++launches, grid = x, block = a, shared = bytes, stream = on;
    address = *(void**)parameters[0], number = *(float*)parameters[1], count = *(long long*)parameters[2];
    if (code) return code;
    return function != (void*)0x9876543210 || y != 1 || z != 1 || b != 1 || c != 1 || extra || depth != 1;
}
int cuGetErrorString(int, const char** text) { *text = "the driver's own words"; return 0; }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.cpp").write_text(DRIVER)
    subprocess.run(["g++", "-shared", "-fPIC", "driver.cpp", "-o", "driver.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "driver.so"))


@pytest.fixture
def kernels(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernels:
    monkeypatch.setattr(launch, "driver", lambda: library)
    monkeypatch.setattr(build, "image", lambda name, capability: f"{name} {capability[0]}.".encode() + b"\0\0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0xABCDEF0123))
    for name in ("launches", "allowed", "pushed", "depth", "code", "loaded"):
        ctypes.c_int.in_dll(library, name).value = 0
    return Kernels("lars", torch.device("cuda", 1))


def told(library: ctypes.CDLL, name: str, kind: Any = ctypes.c_int) -> int:
    return int(kind.in_dll(library, name).value or 0)


def test_a_kernel_gets_its_arguments_and_its_stream(kernels: Kernels, library: ctypes.CDLL) -> None:
    assert kernels.shared_limit == 232448
    assert bytes((ctypes.c_char * 8).in_dll(library, "module_bytes")).startswith(b"lars 9.")
    x = torch.zeros(3)
    kernels.launch("scale", 5, 128, 64, x, ctypes.c_float(1.5), ctypes.c_longlong(1 << 40))
    assert bytes((ctypes.c_char * 6).in_dll(library, "name")) == b"scale\0"
    assert (told(library, "grid"), told(library, "block"), told(library, "shared")) == (5, 128, 64)
    assert told(library, "address", ctypes.c_void_p) == x.data_ptr()
    assert ctypes.c_float.in_dll(library, "number").value == 1.5
    assert told(library, "count", ctypes.c_longlong) == 1 << 40
    assert told(library, "stream", ctypes.c_void_p) == 0xABCDEF0123
    assert told(library, "depth") == 0
    assert told(library, "allowed") == 0


def test_more_shared_memory_is_asked_for_once(kernels: Kernels, library: ctypes.CDLL) -> None:
    arguments = torch.zeros(1), ctypes.c_float(0), ctypes.c_longlong(0)
    kernels.launch("scale", 1, 32, 100_000, *arguments)
    assert told(library, "allowed") == 100_000
    ctypes.c_int.in_dll(library, "allowed").value = 0
    before = told(library, "pushed")
    kernels.launch("scale", 1, 32, 99_000, *arguments)
    assert told(library, "allowed") == 0
    assert told(library, "pushed") == before + 1  # the launch alone
    kernels.launch("scale", 1, 32, 110_000, *arguments)
    assert told(library, "allowed") == 110_000


def test_what_the_driver_refuses_is_an_error_in_its_words(kernels: Kernels, library: ctypes.CDLL) -> None:
    ctypes.c_int.in_dll(library, "code").value = 700
    with pytest.raises(RuntimeError, match=r"the driver's own words \(700\)"):
        kernels.launch("scale", 1, 32, 0, torch.zeros(1), ctypes.c_float(0), ctypes.c_longlong(0))
    assert told(library, "depth") == 0


@pytest.mark.parametrize(("code", "error"), [(209, build.UnavailableError), (700, launch.DriverError)])
def test_only_a_kernel_that_is_not_for_this_gpu_is_done_without(
    kernels: Kernels, library: ctypes.CDLL, code: int, error: type[Exception]
) -> None:
    """An earlier kernel's failure is told at the next call of the driver, whatever that is."""
    ctypes.c_int.in_dll(library, "code").value = code
    with pytest.raises(error, match=rf"the driver's own words \({code}\)"):
        Kernels("lars", torch.device("cuda", 1))
