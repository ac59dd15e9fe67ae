"""How a step is carried out: by torch.compile and CUDA graphs where they serve, and never compiled twice for one run.

`compiled` gives the stage what it calls in place of the model, and says in the log what that is and why. What it
computes is what the model computes, within rounding; the model itself stays as it was: its parameters, the names of its
state, and eager for whoever else calls it, as an evaluation does. Nothing is chosen by measuring, so that a run that
was interrupted ends with the bits of one that was not.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import io
import os
import platform
import shutil
import subprocess
import sysconfig
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from barlow import config, dist
from barlow.errors import UserError
from barlow.files import write_whole

Forward = Callable[[Sequence[Tensor]], tuple[Tensor, Mapping[str, Tensor]]]
Say = Callable[[str], object]


def compiled(
    model: nn.Module,
    knobs: config.Speed,
    device: torch.device,
    folder: Path,
    say: Say,
    pieces: Sequence[nn.Module] = (),
    why: str | None = None,
) -> Forward:
    """What to call with the views instead of `model`: loss and metrics, which stay valid for as long as one keeps them.

    Alone, all of it is compiled at once. Among ranks, these `pieces` of it are, each in one: what lies between them has
    collectives that are waited for later, and DistributedDataParallel takes their gradients up as it did. What is
    compiled is kept in `folder` for the next start of the run. `why`: what `why_not` has said.
    """
    if why := why_not(knobs, device) if why is None else why:
        say(f"step: not compiled: {why}")
        return model
    alone = dist.world_size() == 1
    graphs = knobs.graphs != "off" and device.type == "cuda" and alone
    say("step: to be compiled, at the first one")
    kept = Kept(folder / f"{machine(device)}-{dist.local_rank()}.tar", say)
    _order_fixed()
    if device.type == "cuda" and "deterministic" not in options(graphs):  # as before torch 2.10
        say(f"warning: torch {torch.__version__} compiles by timing: a resumed run may end with other bits")
    if alone:
        return _Compiled(torch.compile(model, dynamic=False, options=options(graphs)), graphs, kept, say)
    torch._dynamo.config.optimize_ddp = False  # it would cut the pieces up where gradients are sent, and cannot
    for piece in pieces:
        _compile_in_place(piece)
    return _Compiled(model, graphs, kept, say)


def _compile_in_place(piece: nn.Module) -> None:
    """Its calls in training are compiled; in an evaluation it is what it was, for any size of batch."""
    eager = piece.forward
    fast = torch.compile(eager, dynamic=False, options=options(graphs=False))

    def forward(*arguments: Any) -> Any:
        return (fast if piece.training else eager)(*arguments)

    piece.forward = forward


class _Compiled:
    """The compiled model; once its first step is over, that is told, and what was compiled is kept."""

    def __init__(self, fast: Callable[..., Any], graphs: bool, kept: Kept, say: Say) -> None:
        self.fast, self.graphs, self.kept, self.say = fast, graphs, kept, say
        self.calls = 0
        self.began = 0.0

    def __call__(self, views: Sequence[Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self.calls == 0:
            self.began = time.perf_counter()
        elif self.calls == 1:  # backward is compiled at the first call of it: only now all of it is done
            fresh = self.kept.keep()
            source = "compilation included" if fresh else "compiled at an earlier start"
            seconds = time.perf_counter() - self.began
            self.say(f"step: compiled, {self.in_graphs()}; the first took {seconds:.1f} s, {source}")
        self.calls += 1
        if not self.graphs:
            loss, metrics = self.fast(views)
            return loss, metrics
        torch.compiler.cudagraph_mark_step_begin()
        loss, metrics = self.fast(views)
        # The next replay writes where these lie, and whoever calls may keep them. Gradients lie there as well: the
        # optimizer has used them by then, and zero_grad(set_to_none=True) has let go of them.
        return loss.clone(), {name: metric.clone() for name, metric in metrics.items()}

    def in_graphs(self) -> str:
        if not self.graphs:
            return "without CUDA graphs"
        left_out = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]  # which inductor tells nobody
        return f"but {left_out} parts of it not in CUDA graphs" if left_out else "in CUDA graphs"


def why_not(knobs: config.Speed, device: torch.device) -> str:
    """Why nothing is compiled; empty if it is: the same on all ranks, which would otherwise wait for each other in
    different collectives. Known before the first step, which would fail of it; "on" that cannot be is a UserError."""
    why = _why_not_here(knobs, device)
    if dist.highest(int(bool(why))) and not why:
        why = "another rank cannot"
    if why and knobs.compile == "on":
        raise UserError(f"--speed.compile on: {why}; give auto or off")
    return why


def _why_not_here(knobs: config.Speed, device: torch.device) -> str:
    if knobs.compile == "off":
        return "as asked"
    if knobs.compile == "auto" and device.type == "cpu":
        return "it would gain little on a CPU"
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if torch.cuda.get_device_capability(device) < (7, 0):
            return f"triton does not know {torch.cuda.get_device_name(device)}"
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "gcc"
    else:
        compiler = os.environ.get("CXX", "g++")
    schemes = ("posix_prefix", sysconfig.get_default_scheme())
    header = [f"-I{sysconfig.get_path('include', scheme)}" for scheme in schemes]
    command = [compiler, "-fsyntax-only", *header, "-x", "c++" if device.type == "cpu" else "c", "-"]
    try:
        subprocess.run(command, input="#include <Python.h>\n", text=True, capture_output=True, check=True)
    except subprocess.CalledProcessError as error:
        told = next((line for line in error.stderr.splitlines() if "error" in line), "it fails")
        return f"{compiler} finds no Python.h ({told.strip()})"
    except OSError as error:
        return f"there is no C compiler ({compiler}: {error.strerror})"
    return ""


def options(graphs: bool) -> dict[str, Any]:
    """Of inductor. Left alone, it times variants of its reductions on the GPU and takes the fastest: another order of
    summation in another process. Those that this version of torch does not know yet are left out."""
    wanted = {
        "triton.cudagraphs": graphs,
        "deterministic": True,
        "dynamic_scale_rblock": False,
        "max_autotune": False,
        "max_autotune_pointwise": False,
        "max_autotune_gemm": False,
        "coordinate_descent_tuning": False,
    }
    known = set(torch._inductor.list_options())
    return {name: value for name, value in wanted.items() if name in known}


def _order_fixed() -> None:
    """Newer torch writes the gradient of max pooling as a scatter of sums, whose order a GPU leaves to chance. Without
    that decomposition it is gathered, in one order, and fused with what comes next."""
    from torch._inductor import decomposition

    decomposition.decompositions.pop(torch.ops.aten.max_pool2d_with_indices_backward.default, None)
    if hasattr(decomposition.fast_random_decomps, "cache_clear"):
        decomposition.fast_random_decomps.cache_clear()


def machine(device: torch.device) -> str:
    """A name for all that compiled code depends on, which can be in a file's."""
    cpu = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = "".join(sorted({line for line in file if line.startswith(("model name", "flags"))}))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    exact = f"{torch.__version__} {torch.version.cuda} {platform.python_version()} {name} {cpu}"
    told = "".join(c if c.isalnum() or c in ".+" else "-" for c in f"{name}-torch-{torch.__version__}")
    return f"{told}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def own_folder(path: Path) -> Path:
    """An empty folder on the local disk for what belongs in `path`. The same one at each start, so that processes which
    end without cleaning up leave one folder behind, not one each."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    root = "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()  # not a job's own: files name one another
    folder = Path(root) / f"barlow-compiled-{os.getuid()}-{digest}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:  # another user's, or another process is at it
        folder = Path(tempfile.mkdtemp(prefix="barlow-compiled-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Kept:
    """Inductor's folder of compiled code: this process's own on the local disk, and in one file of the run folder.

    torch.compiler.save_cache_artifacts would be the way, but it leaves out what g++ has made, on a CPU nearly all. Like
    the run folder's code/, the file is code that the run's owner wrote; nobody else's is read.
    """

    def __init__(self, path: Path, say: Say) -> None:
        self.path, self.say = path, say
        self.local = own_folder(path)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.local)
        os.environ["TRITON_CACHE_DIR"] = str(self.local / "triton")
        self._unpack()
        self.before = self._files()
        self.writing: threading.Thread | None = None

    def keep(self) -> bool:
        """Whether there is something new; if so, it is written, beside the training."""
        fresh = self._files()
        if fresh <= self.before:
            return False
        self.before = fresh
        if dist.rank() != dist.local_rank():
            return True  # the ranks of the first node write what those of all nodes read
        self.writing = threading.Thread(target=self._write, name="keep what is compiled", daemon=True)
        self.writing.start()
        return True

    def _files(self) -> set[Path]:
        return {p.relative_to(self.local) for p in self.local.rglob("*") if p.is_file() and p.suffix != ".lock"}

    def _unpack(self) -> None:
        try:
            stored = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            self.say(f"warning: {self.path} cannot be read ({error.strerror}): what is in it is compiled again")
            return
        digest, packed = stored[:32], stored[32:]
        if hashlib.sha256(packed).digest() != digest:
            self.say(f"warning: {self.path} is damaged: what was in it is compiled again")
            return
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            tar.extractall(self.local, filter="data")

    def _write(self) -> None:
        try:
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
                for name in sorted(self.before):
                    tar.add(self.local / name, str(name))
            self.path.parent.mkdir(exist_ok=True)
            write_whole(self.path, hashlib.sha256(packed.getvalue()).digest() + packed.getvalue())
        except OSError as error:
            self.say(f"warning: what was compiled is not kept for the next start: {error}")
