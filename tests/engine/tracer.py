"""Follows a process, thread by thread, through every system call that changes files below a folder, and can end it
right before any of them. By ptrace itself, for a process that kills at a time of its own choosing would miss most."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long
TRACEME, SYSCALL, SETOPTIONS, GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
OPTIONS = 0x1 | 0x8 | 0x100000  # mark the stops of calls; follow threads; what is followed ends with its follower
ALL = 0x40000000  # __WALL: wait for threads too
ENTRY, EXIT = 1, 2

# name -> number, and which argument is a handle ("f"), a path ("p") or the folder that a path starts from ("d")
SHAPE = {
    "write": "f", "pwrite64": "f", "writev": "f", "pwritev": "f", "sendfile": "f", "copy_file_range": "__f",
    "fallocate": "f", "ftruncate": "f", "fsync": "f", "fdatasync": "f", "sync_file_range": "f", "syncfs": "f",
    "open": "p", "creat": "p", "truncate": "p", "rename": "pp", "unlink": "p", "rmdir": "p", "mkdir": "p",
    "link": "pp", "symlink": "_p", "openat": "dp", "openat2": "dp", "renameat": "dpdp", "renameat2": "dpdp",
    "unlinkat": "dp", "mkdirat": "dp", "linkat": "dpdp", "symlinkat": "_dp",
}  # fmt: skip
NUMBERS = {
    "x86_64": {
        "write": 1, "open": 2, "pwrite64": 18, "writev": 20, "sendfile": 40, "fsync": 74, "fdatasync": 75,
        "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87,
        "symlink": 88, "openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266,
        "sync_file_range": 277, "fallocate": 285, "pwritev": 296, "syncfs": 306, "renameat2": 316,
        "copy_file_range": 326, "openat2": 437,
    },
    "aarch64": {
        "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38, "truncate": 45, "ftruncate": 46,
        "fallocate": 47, "openat": 56, "write": 64, "writev": 66, "pwrite64": 68, "pwritev": 70, "sendfile": 71,
        "fsync": 82, "fdatasync": 83, "sync_file_range": 84, "syncfs": 267, "renameat2": 276, "copy_file_range": 285,
        "openat2": 437,
    },
}  # fmt: skip
NAMES = {number: name for name, number in NUMBERS.get(platform.machine(), {}).items()}


@dataclass
class Call:
    """A system call that changes files below the folder."""

    thread: int  # 0: the main one, then in the order of their start
    number: int  # of such calls in that thread, from 0
    name: str
    paths: tuple[str, ...]  # of what it works on
    arguments: tuple[int, ...]
    data: bytes = b""  # that it writes
    result: int = 0

    def __str__(self) -> str:
        return f"{self.name} {' '.join(os.path.basename(path) for path in self.paths)} (thread {self.thread})"


class _Info(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint8),
        ("_pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("number", ctypes.c_uint64),  # at the exit: the result
        ("arguments", ctypes.c_uint64 * 6),
    )


def follow(
    program: Callable[[], None], folder: Path, kill_before: tuple[int, int] | None = None
) -> tuple[list[Call], bool]:
    """Run `program` in a child to its end, or until its `thread`'s call `number` is about to happen, which then never
    does. Returns the calls in the order in which they ended, and whether it was killed."""
    if not NAMES:
        raise NotImplementedError(
            f"the numbers of system calls on {platform.machine()} are not known: add them to {__file__}"
        )
    pid = os.fork()
    if pid == 0:
        _be_followed(program)
    os.waitpid(pid, ALL)
    if libc.ptrace(SETOPTIONS, pid, None, OPTIONS) != 0:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, ALL)
        raise PermissionError("ptrace is not permitted here (a container without SYS_PTRACE?): nothing could be cut")
    follower = _Follower(pid, str(folder), kill_before)
    try:
        return follower.run()
    finally:
        os.close(follower.memory)


def _be_followed(program: Callable[[], None]) -> None:
    """The child: a whole process that ends with what its program comes to."""
    code = 1
    try:
        libc.ptrace(TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        program()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


class _Follower:
    def __init__(self, pid: int, folder: str, kill_before: tuple[int, int] | None) -> None:
        self.pid, self.folder, self.kill_before = pid, folder, kill_before
        self.memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        self.threads = {pid: 0}
        self.counts = [0]
        self.under_way: dict[int, Call] = {}
        self.calls: list[Call] = []
        self.info = _Info()

    def run(self) -> tuple[list[Call], bool]:
        libc.ptrace(SYSCALL, self.pid, None, None)
        while True:
            tid, status = os.waitpid(-1, ALL)
            if not os.WIFSTOPPED(status):
                if tid != self.pid:
                    continue
                if status != 0:
                    raise RuntimeError(f"the run ended with {os.waitstatus_to_exitcode(status)}; calls: {self.calls}")
                return self.calls, False
            deliver = 0
            if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80:
                if not self._goes_on(tid):
                    os.kill(self.pid, signal.SIGKILL)
                    while os.waitpid(-1, ALL)[0] != self.pid:
                        pass
                    return self.calls, True
            elif tid not in self.threads:  # a new one, which begins with a stop
                self.threads[tid] = len(self.threads)
                self.counts.append(0)
            elif status >> 16 == 0:
                deliver = os.WSTOPSIG(status)
            libc.ptrace(SYSCALL, tid, None, deliver)

    def _goes_on(self, tid: int) -> bool:
        info = self.info
        libc.ptrace(GET_SYSCALL_INFO, tid, ctypes.sizeof(info), ctypes.addressof(info))
        if info.op == EXIT:
            call = self.under_way.pop(tid, None)
            if call is not None:
                call.result = ctypes.c_int64(info.number).value
                self.calls.append(call)
            return True
        if info.op != ENTRY or info.number not in NAMES:
            return True
        call = self._call(tid, NAMES[info.number], tuple(info.arguments))
        if call is None:
            return True
        self.counts[call.thread] += 1
        self.under_way[tid] = call
        return (call.thread, call.number) != self.kill_before

    def _call(self, tid: int, name: str, arguments: tuple[int, ...]) -> Call | None:
        paths = []
        start = ""  # of a relative path
        for kind, argument in zip(SHAPE[name], arguments, strict=False):
            if kind == "f":
                paths.append(self._of_handle(argument))
            elif kind == "d":
                start = self._of_handle(argument)
            elif kind == "p":
                paths.append(os.path.join(start, self._text(argument)))
        if not any(path.startswith(self.folder) for path in paths):
            return None
        if name == "openat" and not arguments[2] & (os.O_CREAT | os.O_TRUNC):
            return None
        if name == "open" and not arguments[1] & (os.O_CREAT | os.O_TRUNC):
            return None
        data = b""
        if name == "write" and self.kill_before is None:
            data = os.pread(self.memory, arguments[2], arguments[1])
        thread = self.threads[tid]
        return Call(thread, self.counts[thread], name, tuple(paths), arguments, data)

    def _of_handle(self, handle: int) -> str:
        handle = ctypes.c_int(handle).value
        try:
            return os.readlink(f"/proc/{self.pid}/{'cwd' if handle == -100 else f'fd/{handle}'}")
        except OSError:
            return ""

    def _text(self, address: int) -> str:
        found = b""
        while b"\0" not in found:
            found += os.pread(self.memory, 4096 - (address + len(found)) % 4096, address + len(found))
        return os.fsdecode(found.split(b"\0")[0])
