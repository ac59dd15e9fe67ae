"""From CUDA C++ to what a GPU loads, by NVRTC: the compiler that torch's own wheels bring.

So there is no build step, no nvcc to be found on a cluster, and nothing that must fit the version of torch. A source
takes about a second, once for each kind of GPU: what comes out is kept in ~/.cache/barlow (or $BARLOW_CACHE)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from contextlib import suppress
from pathlib import Path

import torch

from barlow.files import write_whole

FOLDER = Path(__file__).parent
OPTIONS = ("-std=c++17", "-lineinfo")


class UnavailableError(Exception):
    """Why there is no fused kernel here."""


def source(name: str) -> str:
    """NAME.cu with what all kernels share before it."""
    parts = [(FOLDER / file).read_text() for file in ("common.cuh", f"{name}.cu")]
    return f'{parts[0]}\n#line 1 "{name}.cu"\n{parts[1]}'


def image(name: str, capability: tuple[int, int]) -> bytes:
    """Machine code of NAME.cu for GPUs of this compute capability, or PTX where NVRTC is older than the GPU."""
    text, arch = source(name), architecture(capability)
    digest = hashlib.sha256("\0".join((text, arch, *OPTIONS, str(nvrtc_version()))).encode()).hexdigest()[:16]
    kept = cache_folder() / "kernels" / f"{name}-{arch}-{digest}"
    with suppress(OSError):
        return kept.read_bytes()
    made = compile_source(text, name, arch)
    with suppress(OSError):  # a home that cannot be written costs a second at each start
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, made)
    return made


def cache_folder() -> Path:
    told = os.environ.get("BARLOW_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "barlow")
    return Path(told).expanduser()


def architecture(capability: tuple[int, int]) -> str:
    """sm_90 for (9, 0); the newest that NVRTC knows, as PTX for the driver to finish, for a GPU newer than that."""
    count = ctypes.c_int()
    check(nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    known = (ctypes.c_int * count.value)()
    check(nvrtc().nvrtcGetSupportedArchs(known))
    wanted = 10 * capability[0] + capability[1]
    if wanted in known:
        return f"sm_{wanted}"
    older = [arch for arch in known if arch < wanted]
    if not older:
        raise UnavailableError(f"CUDA {torch.version.cuda} has no code for a GPU of compute capability {wanted / 10}")
    return f"compute_{max(older)}"


def compile_source(text: str, name: str, arch: str) -> bytes:
    program = ctypes.c_void_p()
    library = nvrtc()
    check(library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None))
    try:
        options = [option.encode() for option in (f"--gpu-architecture={arch}", *OPTIONS)]
        failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if failed:
            log = fetch(program, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
            raise UnavailableError(f"{name}.cu does not compile for {arch}:\n{log.decode().rstrip(chr(0))}")
        if arch.startswith("sm_"):
            return fetch(program, library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN)
        return fetch(program, library.nvrtcGetPTXSize, library.nvrtcGetPTX)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def fetch(program: ctypes.c_void_p, ask_size: ctypes._NamedFuncPointer, ask: ctypes._NamedFuncPointer) -> bytes:
    size = ctypes.c_size_t()
    check(ask_size(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    check(ask(program, buffer))
    return buffer.raw


def check(code: int) -> None:
    if code:
        ask = nvrtc().nvrtcGetErrorString
        ask.restype = ctypes.c_char_p
        raise UnavailableError(f"NVRTC: {ask(code).decode()}")


def nvrtc_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    check(nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """The library that belongs to torch's CUDA: beside torch in its wheels, or where the system has it."""
    if torch.version.cuda is None:
        raise UnavailableError("this torch is built without CUDA")
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    packages = Path(torch.__file__).parents[1]
    tried = [*sorted(packages.glob(f"nvidia/*/lib/{name}")), *sorted(packages.glob(f"torch/lib/{name}")), Path(name)]
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for path in (*tried, Path(home, "lib64", name)):
        with suppress(OSError):
            return ctypes.CDLL(str(path))
    raise UnavailableError(
        f"{name}, which compiles the kernels, is not found: install the nvidia-cuda-nvrtc that fits torch"
    )
