"""python -m slurm.devcluster up|down|status [--folder .cluster] [--nodes 4] [--grace 0]: a real SLURM on this machine.

Takes Debian's slurm-wlm and munge; starts one munged, one slurmctld and a slurmd a node, all on 127.0.0.1 with their
own ports. Partition `main` is the default one; jobs of `urgent` preempt those of `main`, which go back to the queue.
Everything lives in the folder. Outside it there is at most one line in /etc/hosts (root only) and, if the folder's path
is too long for sockets, one folder under /tmp; `down` takes both away again."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from barlow.errors import UserError, one_line_errors

PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo")
DAEMONS = {"munged", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd"}
HOSTS = Path("/etc/hosts")
SOCKET_LIMIT = 108  # bytes in the path of a Unix socket; a step's socket is SPOOL/n1_JOBID.STEPID
TIMEOUT = 30.0  # seconds until every node must be idle

SLURM_CONF = """\
ClusterName=dev
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={sockets}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={sockets}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=200000,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
FirstJobId={first_job}
MaxJobCount=10000
KillWait=5
SlurmdTimeout={lost}
MessageTimeout=30
ReturnToService=2
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] CPUs=16 RealMemory=16000
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=INFINITE
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE
"""


def up(folder: Path, nodes: int = 4, grace: int = 0, lost: int = 300) -> None:
    """Start the cluster and wait until every node is idle. One that is up stays; what is left of a dead one goes.

    `lost`: seconds of silence, here up to three times as many, after which SLURM gives a node up for lost."""
    folder = folder.absolute()
    if is_up(folder):
        print(f"the cluster in {folder} is up\n{export_line(folder)}")
        return
    refuse_unusable(folder, nodes)
    down(folder, quiet=True)
    started = time.monotonic()
    try:
        sockets = write(folder, nodes, grace, lost)
        munge = {"key-file": folder / "munge.key", "log-file": folder / "munged.log", "pid-file": folder / "munged.pid"}
        munge |= {"seed-file": folder / "munged.seed", "socket": sockets / "munge.socket"}
        # --force: a group-writable parent folder is a warning then, not the end
        start(folder, "munged", "--force", *(f"--{key}={path}" for key, path in munge.items()))
        start(folder, "slurmctld")
        for node in names(nodes):
            start(folder, "slurmd", "-N", node)
        wait_until_idle(folder, nodes)
    except UserError:
        end(folder)  # its logs stay, until the next `up` or `down`
        raise
    except BaseException:
        down(folder, quiet=True)
        raise
    took = time.monotonic() - started
    print(f"{nodes} nodes up in {took:.1f} s; partitions main (default) and urgent (preempts main)")
    print(export_line(folder))


def down(folder: Path, quiet: bool = False) -> None:
    """End every process of the cluster, jobs' included, and remove its folder and its line in /etc/hosts."""
    folder = folder.absolute()
    known = (folder / "cluster.json").exists()
    if known or not folder.exists():  # someone may have removed it while the cluster was up
        end(folder)
    if known:
        sockets = Path(json.loads((folder / "cluster.json").read_text())["sockets"])
        for place in {sockets, folder}:
            shutil.rmtree(place, ignore_errors=True)
    if not quiet:
        print(f"the cluster in {folder} is down" if known else f"no cluster in {folder}")


def end(folder: Path) -> None:
    """End the processes and take away the line in /etc/hosts."""
    for patience, number in ((3.0, signal.SIGTERM), (5.0, signal.SIGKILL)):
        end, told = time.monotonic() + patience, set[int]()
        while (left := processes(folder)) and time.monotonic() < end:
            for pid in left.keys() - told:
                # What a job runs is killed at once: asked nicely, it could outlive the daemon that waits for it.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number if left[pid] in DAEMONS - {"slurmstepd"} else signal.SIGKILL)
                told.add(pid)
            time.sleep(0.05)
    edit_hosts(folder, nodes=0)


def status(folder: Path) -> int:
    """Whether it is up, what it runs; 0 if up, 1 otherwise."""
    folder = folder.absolute()
    if not is_up(folder):
        print(f"no cluster is up in {folder}: python -m slurm.devcluster up --folder {folder}")
        return 1
    print(export_line(folder))
    for command in (["sinfo"], ["squeue"]):
        print(ask(folder, *command), end="")
    return 0


def is_up(folder: Path) -> bool:
    """All daemons alive, and slurmctld answers that no node is lost."""
    if not (folder / "cluster.json").exists():
        return False
    nodes = json.loads((folder / "cluster.json").read_text())["nodes"]
    running = list(processes(folder).values())
    if "munged" not in running or "slurmctld" not in running or running.count("slurmd") < nodes:
        return False
    return len(node_states(folder)) == nodes and not any("*" in state for state in node_states(folder).values())


def export_line(folder: Path) -> str:
    return f"export SLURM_CONF={folder.absolute() / 'slurm.conf'}"


def names(nodes: int) -> list[str]:
    return [f"n{i + 1}" for i in range(nodes)]


def refuse_unusable(folder: Path, nodes: int) -> None:
    missing = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not found: apt-get install -y slurm-wlm munge (as root), then again")
    if not 1 <= nodes <= 32:
        raise UserError(f"--nodes {nodes}: a development cluster has 1 to 32 nodes")
    if folder.exists() and any(folder.iterdir()) and not (folder / "cluster.json").exists():
        raise UserError(f"{folder} holds something else: give an empty or a new --folder")
    if set(str(folder)) & set(" #%,="):
        raise UserError(f"{folder}: slurm.conf cannot hold a path with one of ' #%,=': give another --folder")


def write(folder: Path, nodes: int, grace: int, lost: int) -> Path:
    """All files of a new cluster. Returns where its sockets go: the folder itself, unless its path is too long."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # munged wants a socket's folder to be searchable by all, and writable by its owner alone
    sockets = folder
    if len(os.fsencode(folder / "n32" / "n32_1234567.4294967291")) >= SOCKET_LIMIT:
        sockets = Path(tempfile.mkdtemp(prefix="barlow-cluster-"))
        sockets.chmod(0o755)
    port = free_ports(nodes + 1)
    (folder / "cluster.json").write_text(json.dumps({"nodes": nodes, "port": port, "sockets": str(sockets)}) + "\n")
    for sub in (folder / "state", *(sockets / node for node in names(nodes))):
        sub.mkdir()
    key = os.open(folder / "munge.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(key, "wb") as file:
        file.write(secrets.token_bytes(128))
    # No cgroup is asked for; without this line slurmd refuses to start where none is mounted, as in some containers.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "slurm.conf").write_text(
        SLURM_CONF.format(
            host=socket.gethostname().split(".")[0],
            user=os.getuid(),
            folder=folder,
            sockets=sockets,
            port=port,
            first_port=port + 1,
            last_port=port + nodes,
            # Ranks derive their rendezvous port from the job id: two clusters on one machine must not count alike.
            first_job=1 + (port - 17000) // 64 * 1000,
            nodes=nodes,
            grace=grace,
            lost=lost,
        )
    )
    edit_hosts(folder, nodes)
    return sockets


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on, below those that jobs and the kernel choose from."""
    blocks = list(range(17000, 20000, 64))[:-1]
    start = os.getpid() % len(blocks)  # two clusters coming up at the same time look in different places
    for first in blocks[start:] + blocks[:start]:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probe = stack.enter_context(socket.socket())
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
            return first
    raise UserError("no free ports between 17000 and 20000: end another cluster first")


def search_path() -> str:
    """Daemons live in sbin, which a user's PATH often lacks."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"])


def start(folder: Path, program: str, *arguments: str) -> None:
    """Start a daemon that puts itself into the background. What it says until then is in boot.log."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    environment["SLURM_CONF"] = str(folder / "slurm.conf")
    path = shutil.which(program, path=search_path())
    with open(folder / "boot.log", "a") as log:
        command = [str(path), *arguments]
        done = subprocess.run(command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    if done.returncode:
        raise UserError(f"{program} did not start: {last_line(folder / 'boot.log')}")


def wait_until_idle(folder: Path, nodes: int) -> None:
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        states = node_states(folder)
        if len(states) == nodes and set(states.values()) == {"idle"}:
            return
        time.sleep(0.1)
    late = [node for node in names(nodes) if states.get(node) != "idle"]
    log = folder / (f"{late[0]}.log" if states else "slurmctld.log")
    heard = states or "slurmctld does not answer"
    raise UserError(f"{', '.join(late)} not idle after {TIMEOUT:.0f} s ({heard}): {last_line(log)}")


def node_states(folder: Path) -> dict[str, str]:
    """State of each node by name ("idle", "alloc", "down*", ...); empty if slurmctld does not answer."""
    lines = ask(folder, "sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %t").splitlines()
    return dict(line.split() for line in lines)


def ask(folder: Path, *command: str) -> str:
    """What a SLURM client says of this cluster; nothing if it fails."""
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def last_line(log: Path) -> str:
    """What a log ends with, and where more is said."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return f"{next((line.strip() for line in reversed(lines) if line.strip()), 'no word')} (more in {log})"


def processes(folder: Path) -> dict[int, str]:
    """The cluster's live processes: its daemons and what its jobs run, both by its SLURM_CONF, and all below these."""
    parents: dict[int, int] = {}
    found: dict[int, str] = {}
    comm: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            pid, fields = int(entry.name), (entry / "stat").read_text().rpartition(")")[2].split()
            if fields[0] == "Z" or pid == os.getpid():
                continue
            parents[pid], comm[pid] = int(fields[1]), (entry / "comm").read_text().strip()
            environment = (entry / "environ").read_bytes().split(b"\0")
            of_job = any(item.startswith(b"SLURMD_NODENAME=") for item in environment)
            if f"SLURM_CONF={folder}/slurm.conf".encode() in environment and (of_job or comm[pid] in DAEMONS):
                found[pid] = comm[pid]
    below = set(found)
    while below:
        below = {pid for pid, parent in parents.items() if parent in below and pid not in found}
        found |= {pid: comm[pid] for pid in below}
    return found


def edit_hosts(folder: Path, nodes: int) -> None:
    """Make node names resolve while the cluster is up (nodes=0: no longer), by a line in /etc/hosts naming the folder.

    Where that may not be written, names stay unknown; a job's ranks then go by the address that SLURM tells them."""
    mark = "# barlow development cluster"
    mine = f"{mark} {folder}\n"
    line = f"127.0.0.1 {' '.join(names(nodes))} {mine}" if nodes else ""
    old = HOSTS.read_text() if HOSTS.exists() else ""
    if mine not in old and (not line or (mark not in old and all(map(resolves, names(nodes))))):
        return
    try:
        with open(HOSTS, "r+") as file:  # written in place: in containers the file is a mount point
            fcntl.flock(file, fcntl.LOCK_EX)
            kept = [text for text in file.read().splitlines(keepends=True) if not text.endswith(mine)]
            unfinished = bool(kept) and not kept[-1].endswith("\n")  # ours goes before such a last line
            kept.insert(len(kept) - unfinished, line)
            file.seek(0)
            file.write("".join(kept))
            file.truncate()
    except OSError as error:
        print(f"note: {HOSTS}: {error.strerror}; if other programs are to know the nodes, add there:\n{line}", end="")


def resolves(name: str) -> bool:
    with contextlib.suppress(OSError):
        return socket.gethostbyname(name) == "127.0.0.1"
    return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slurm.devcluster", description=__doc__)
    parser.add_argument("command", choices=["up", "down", "status"])
    parser.add_argument("--folder", type=Path, default=Path(".cluster"), help="where it lives (default: .cluster)")
    parser.add_argument("--nodes", type=int, default=4, help="how many slurmd to start (default: 4)")
    parser.add_argument("--grace", type=int, default=0, help="seconds a preempted job of `main` is given (default: 0)")
    args = parser.parse_args(argv)
    if args.command == "up":
        up(args.folder, args.nodes, args.grace)
    elif args.command == "down":
        down(args.folder)
    return status(args.folder) if args.command == "status" else 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
