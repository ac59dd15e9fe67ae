"""A compiled kernel, launched with tensors, by the CUDA driver."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from barlow.kernels import build
from barlow.kernels.build import UnavailableError

UNASKED = 47 * 1024  # bytes of dynamic shared memory that any kernel gets: of 48 KB, static ones are part
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # a function's attribute, by its number in cuda.h
MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97  # a device's
NOT_FOR_THIS_GPU = (209, 218, 222)  # no image for it, one it does not understand, of a newer toolkit


class DriverError(RuntimeError):
    """What the driver says of a call; also of work that was enqueued before, and failed."""

    def __init__(self, code: int) -> None:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        super().__init__(f"CUDA driver: {(text.value or b'error').decode()} ({code})")
        self.code = code


class Kernels:
    """The kernels of one .cu file on one GPU."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        image = build.image(name, torch.cuda.get_device_capability(device))
        torch.cuda.synchronize(device)  # torch has made its context by then
        ordinal, self.context, self.module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        check(driver().cuDeviceGet(ctypes.byref(ordinal), device.index))
        check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(self.context), ordinal))
        limit = ctypes.c_int()
        check(driver().cuDeviceGetAttribute(ctypes.byref(limit), MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, ordinal))
        self.shared_limit = limit.value  # bytes of shared memory that a block can have
        self.functions: dict[str, tuple[ctypes.c_void_p, int]] = {}
        try:
            self.run(lambda: driver().cuModuleLoadData(ctypes.byref(self.module), image))
        except DriverError as error:
            if error.code in NOT_FOR_THIS_GPU:
                raise UnavailableError(str(error)) from None
            raise

    def launch(self, name: str, grid: int, block: int, shared: int, *arguments: Any) -> None:
        """Kernel `name` on the current stream, in `grid` blocks of `block` threads with `shared` bytes of dynamic
        shared memory. Arguments are tensors, whose address is passed, or ctypes values of the very type."""
        function = self.function(name, shared)
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        passed, addresses = parameters(arguments)
        self.run(
            lambda: driver().cuLaunchKernel(function, grid, 1, 1, block, 1, 1, shared, stream, addresses, None),
        )
        del passed  # the driver has copied them

    def function(self, name: str, shared: int) -> ctypes.c_void_p:
        found, allowed = self.functions.get(name, (ctypes.c_void_p(), UNASKED))
        if not found:
            self.run(lambda: driver().cuModuleGetFunction(ctypes.byref(found), self.module, name.encode()))
        if shared > allowed:
            self.run(lambda: driver().cuFuncSetAttribute(found, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared))
        self.functions[name] = found, max(shared, allowed)
        return found

    def run(self, call: Any) -> None:
        """A call of the driver in this GPU's context, whatever thread it comes from."""
        check(driver().cuCtxPushCurrent_v2(self.context))
        try:
            check(call())
        finally:
            driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def parameters(arguments: Sequence[Any]) -> tuple[list[Any], Any]:
    """The values, and an array of their addresses: what a kernel is launched with."""
    values = [ctypes.c_void_p(each.data_ptr()) if isinstance(each, Tensor) else each for each in arguments]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    return values, addresses


def check(code: int) -> None:
    if code:
        raise DriverError(code)


@functools.cache
def driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnavailableError(f"no CUDA driver: {error}") from None
