"""From a command to running ranks: `launch` submits a job to SLURM or runs here. All that launchers call.

Everything a user can have got wrong is refused before anything is created."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import submitit

from barlow import history
from barlow.errors import UserError
from barlow.files import read_status, write_json, write_status
from barlow.stop import VARIABLE
from slurm.job.rank import Job
from slurm.job.srun import BEGINS
from slurm.launch import local
from slurm.launch.cluster import Cluster, minutes, resolve
from slurm.launch.follow import follow
from slurm.scontrol import ask, there, value
from slurm.states import job_state

PATIENCE = 15.0  # seconds for SLURM to answer
SIGNAL_DELAY = 120  # seconds before the time limit at which ranks are told to save, at most a quarter of it
DAY = 24 * 60
MAX_FAILURES = 3
PATH = 'export PYTHONPATH="$run/code"${PYTHONPATH:+:$PYTHONPATH}'
# By its plain number the last element of an array means the whole array: scontrol would put all of it back.
ALONE = "export SLURM_JOB_ID=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"


def launch(module: str, folder: Path, cluster: Cluster) -> int:
    """Run MODULE.main(folder) on every rank that `cluster` asks for; returns the command's exit code.

    The run folder must be there, with its snapshot of the code, but for a dry run, which creates nothing."""
    folder = folder.absolute()
    if cluster.dry_run:
        check(cluster, folder)
        print(plan(module, folder, settled(cluster)))
        return 0
    given = {"module": module, "cluster": asdict(cluster)}  # what to ask for when the run is to go on
    cluster = settled(cluster)
    if cluster.cluster == "local":
        return local.run(module, folder, cluster.ranks, given)
    refuse_second(folder)
    write_json(folder / "cluster.json", given)
    log = folder / "logs" / "rank_0.log"
    seen = log.stat().st_size if log.exists() else 0
    job = submit(module, folder, cluster)
    print(f"submitted job {job}: run {folder.name}, {size(cluster)}")
    for what in ("logs -f", "show", "cancel"):
        verb, _, flag = what.partition(" ")
        print(f"  python launchers/jobs.py {verb} {folder.name} {flag}".rstrip() + where(folder), flush=True)
    return follow(folder, job, seen) if cluster.follow else 0


def size(cluster: Cluster) -> str:
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    return f"{nodes} of {cluster.partition}, {local.ranks_in_words(cluster.ranks)}"


def where(folder: Path) -> str:
    """The flag by which jobs.py finds the run, if it needs one."""
    return "" if folder.parent == Path("runs").absolute() else f" --runs-dir {folder.parent}"


def check(cluster: Cluster, folder: Path | None = None) -> int:
    """Refuse what cannot run, before anything is created; returns the number of ranks there will be.

    With the run's folder also a run that is under way already, whose snapshot must not change."""
    cluster = settled(cluster)
    if folder is not None:
        refuse_second(folder)
    if cluster.cluster == "local":
        return cluster.ranks
    refused = run_sbatch(["--test-only"], script(folder or Path("run").absolute(), cluster))
    if refused:
        raise UserError(f"SLURM refuses the job: {refused} (asked for: {asked_for(cluster)})")
    return cluster.ranks


def settled(cluster: Cluster) -> Cluster:
    """The same with every open value decided; `cluster.cluster` is "slurm" or "local" then."""
    cluster = resolve(cluster)
    if cluster.cluster == "local":
        return cluster
    silence = why_no_slurm()
    if not silence:
        return within_partition(replace(cluster, cluster="slurm"))
    if cluster.nodes > 1:
        raise UserError(f"--nodes {cluster.nodes}: {silence}; --cluster local runs {cluster.ranks} ranks here")
    if cluster.cluster == "slurm":
        raise UserError(f"--cluster slurm: {silence}; --cluster local runs here")
    return replace(cluster, cluster="local")


def why_no_slurm() -> str:
    """Empty if SLURM answers; otherwise what is wrong, and what would help."""
    if not shutil.which("sinfo") or not shutil.which("sbatch"):
        return "there is no SLURM on this machine (no sinfo, no sbatch)"
    if ask_sinfo() is not None:
        return ""
    own = Path(".cluster/slurm.conf").absolute()
    if own.exists() and os.environ.get("SLURM_CONF") != str(own):
        return f"SLURM does not answer, but a development cluster is up: export SLURM_CONF={own}"
    return "SLURM does not answer" + (f" (SLURM_CONF={os.environ['SLURM_CONF']})" if "SLURM_CONF" in os.environ else "")


def within_partition(cluster: Cluster) -> Cluster:
    """Name the partition and the time limit if they are open; refuse what the partition does not have."""
    listed = ask_sinfo("--all", "--format=%P|%D|%l") or []  # name (the default one with a star), nodes, limit
    known = {name.rstrip("*"): (int(nodes), limit) for name, nodes, limit in listed}
    default = [name.rstrip("*") for name, *_ in listed if name.endswith("*")]
    partition = cluster.partition or os.environ.get("SBATCH_PARTITION", "") or (default[0] if default else "")
    if not partition:
        raise UserError(f"SLURM has no default partition: give --partition, one of {', '.join(known)}")
    parts = partition.split(",")
    if unknown := [part for part in parts if part not in known]:
        raise UserError(f"no partition {unknown[0]!r}: SLURM here has {', '.join(known)} (--partition)")
    most = max(known[part][0] for part in parts)
    if cluster.nodes > most:
        raise UserError(f"--nodes {cluster.nodes}: partition {partition} has {most}")
    limits = [minutes(limit) for part in parts if (limit := known[part][1])[:1].isdigit()]
    longest = max(limits) if len(limits) == len(parts) else None
    if cluster.time and longest and minutes(cluster.time) > longest:
        raise UserError(f"--time {cluster.time}: partition {partition} allows {longest} minutes")
    time = cluster.time or str(min(longest or DAY, DAY))
    return replace(cluster, partition=partition, time=time)


def ask_sinfo(*options: str) -> list[list[str]] | None:
    """Lines and fields of what it says; None if there is no SLURM to ask, as where only its packages are installed."""
    try:
        done = subprocess.run(["sinfo", "--noheader", *options], capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        instead = "try again (--cluster slurm), or run here (--cluster local)"
        raise UserError(f"SLURM is there, but sinfo has no answer after {PATIENCE:.0f} s: {instead}") from None
    if done.returncode:
        return None
    return [[field.strip() for field in line.split("|")] for line in done.stdout.splitlines()]


def asked_for(cluster: Cluster) -> str:
    names = ("partition", "nodes", "gpus_per_node", "cpus_per_rank", "mem", "time", "account", "qos", "constraint")
    asked = {name: getattr(cluster, name) for name in names}
    return ", ".join(f"{name} {value}" for name, value in asked.items() if value)


def refuse_second(folder: Path) -> None:
    """A run that waits or runs, here or in SLURM, is not started again."""
    local.refuse_second(folder)
    job = str(read_status(folder).get("job") or "")
    state = job_state(job) if job and shutil.which("squeue") else None
    if state and state.alive and (state.run == folder.name or "_" in job):  # an array has one name for all
        raise UserError(f"run {folder.name} is job {job} already ({state}): scancel {job}, or choose another --run")


class Executor(submitit.SlurmExecutor):
    """submitit's, which also notes the job in status.json while its ranks still wait for their pickle, so that it never
    overwrites what a rank has written."""

    runs: Sequence[Path]
    array = False

    def _submit_command(self, command: str) -> submitit.Job[None]:
        with contextlib.ExitStack() as alone:
            for run in self.runs:  # the same command given twice at once
                alone.enter_context(local.only_run(run))
                write_status(run, state="pending", why="", job="")
            return self._submit_alone(command)

    def _submit_alone(self, command: str) -> submitit.Job[None]:
        job: submitit.Job[None] = super()._submit_command(command)
        for number, run in enumerate(self.runs):
            name = f"{job.job_id}_{number}" if self.array else job.job_id
            write_status(run, job=name)
            history.note(run, "submitted", job=name)
        return job


def executor(folder: Path, cluster: Cluster, after: Sequence[str] = ()) -> Executor:
    """All that is asked of SLURM. `folder` may be LINKS/%a: a link to a run for each element of an array.

    `after`: jobs that must have ended well before this one starts; if one does not, SLURM cancels it."""
    array = folder.name == "%a"
    made = Executor(folder.parent / "submitit" if array else folder / "logs" / "submitit")
    made.array, made.runs = array, [] if array else [folder]
    options: dict[str, object] = {"requeue": True}
    options |= {"output": folder / "logs" / "submitit" / "%A_%a_0_log.out"} if array else {}
    options |= {"mem": cluster.mem} if cluster.mem else {}
    for option in cluster.sbatch:
        key, equals, value = option.lstrip("-").partition("=")
        options[key] = value if equals else True
    options |= {"dependency": f"afterok:{':'.join(after)}", "kill-on-invalid-dep": "yes"} if after else {}
    srun = ["--kill-on-bad-exit=1", "--wait=0", "--distribution=block", "--open-mode=append"]
    srun += [f"--output={folder / 'logs' / 'rank_%t.log'}"]
    if cluster.cpus_per_rank:
        srun.append(f"--cpus-per-task={cluster.cpus_per_rank}")  # since SLURM 22.05 srun does not take it from sbatch
    begins = f"echo {BEGINS} ${{SLURM_RESTART_COUNT:-0}}"
    run = f"run={shlex.quote(str(folder.parent))}/" + ("$SLURM_ARRAY_TASK_ID" if array else shlex.quote(folder.name))
    settle = f'cd "$run/code" && exec {shlex.quote(sys.executable)} -m slurm.job.settle "$run" $code'
    settle += f" --max-failures {cluster.max_failures or MAX_FAILURES}"
    made.update_parameters(
        job_name=folder.name,
        partition=cluster.partition,
        time=minutes(cluster.time),
        nodes=cluster.nodes,
        ntasks_per_node=cluster.ranks_of_a_node,
        gpus_per_node=cluster.gpus_per_node or None,
        cpus_per_task=cluster.cpus_per_rank,
        account=cluster.account or None,
        qos=cluster.qos or None,
        constraint=cluster.constraint or None,
        exclude=cluster.exclude or None,
        exclusive=cluster.exclusive or None,
        mail_user=cluster.mail_user or None,
        mail_type=cluster.mail_type or None,
        signal_delay_s=signal_delay(cluster),
        wckey=None,  # submitit's own would be refused where keys are accounted for
        stderr_to_stdout=True,
        additional_parameters=options,
        srun_args=srun,
        # srun starts ranks in the snapshot, so Python looks there first; PYTHONPATH leads their own children there.
        # The trap: at its time limit the script gets SIGTERM too, and has its last line still to run.
        setup=["trap : TERM USR2", begins, *cluster.setup, *notice(cluster), run, 'cd "$run/code"', PATH],
        teardown=["code=$?", *([ALONE] if array else []), settle, "exit $code"],
    )
    return made


def signal_delay(cluster: Cluster) -> int:
    return min(SIGNAL_DELAY, minutes(cluster.time) * 15)


def notice(cluster: Cluster) -> list[str]:
    """A line of the script that tells ranks how many seconds they have after each signal; see barlow.stop."""
    parts = [part for part in ask_scontrol("partition") if value(part, "PartitionName") in cluster.partition.split(",")]
    graces = [int(grace) for part in parts if (grace := value(part, "GraceTime")).isdigit() and grace != "0"]
    wait = re.search(r"KillWait\s*=\s*(\d+)", "\n".join(ask_scontrol("config")))
    term = min(graces) if graces else int(wait.group(1)) if wait else 0
    return [f"export {VARIABLE}='SIGTERM={term} SIGUSR2={signal_delay(cluster)}'"]


def ask_scontrol(what: str) -> list[str]:
    """The lines of `scontrol show`; none if there is none."""
    return (ask("scontrol", "--oneliner", "show", what) or "").splitlines() if there() else []


def script(folder: Path, cluster: Cluster, after: Sequence[str] = ()) -> str:
    """The sbatch script, as submitit will write it."""
    made = executor(folder, cluster, after)
    text: str = made._make_submission_file_text(made._submitit_command_str, "")
    return text


def plan(module: str, folder: Path, cluster: Cluster, after: Sequence[str] = ()) -> str:
    """What a dry run prints: the sbatch script and, as comments below it, what each rank runs."""
    if cluster.cluster == "slurm":
        what = f"{module}.main({str(folder)!r}) with the code of {folder / 'code'}"
        called = f"# each of the {cluster.ranks} ranks calls, through submitit:\n# {what}"
        return f"{script(folder, cluster, after)}\n{called}"
    lines = [f"# {local.ranks_in_words(cluster.ranks)} here, each in {folder / 'code'}:"]
    for environment in local.environments(folder, cluster.ranks, "dry-run"):
        shown = [f"{key}={environment[key]}" for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
        lines.append(" ".join([*shown, shlex.join(local.command(module, folder))]))
    return "\n".join(lines)


def submit(module: str, folder: Path, cluster: Cluster, after: Sequence[str] = ()) -> str:
    """Hand the job to SLURM; returns its id."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with refusals(cluster):
        return str(executor(folder, cluster, after).submit(Job(module, str(folder), os.getcwd())).job_id)


@contextlib.contextmanager
def refusals(cluster: Cluster) -> Iterator[None]:
    """What SLURM does not accept becomes one line."""
    try:
        with outside_any_job():
            yield
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, OSError) as error:
        raise UserError(f"SLURM refuses the job: {one_line(str(error))} (asked for: {asked_for(cluster)})") from None


def run_sbatch(options: list[str], text: str) -> str:
    """sbatch with a script on its standard input; empty if it accepts, else its complaint in one line."""
    with outside_any_job():
        try:
            done = subprocess.run(["sbatch", *options], input=text, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            return "sbatch has no answer after 120 s"
    return one_line(done.stderr) if done.returncode else ""


def one_line(complaint: str) -> str:
    """The last error among sbatch's words: the others lead to it."""
    errors = re.findall(r"(?:error|failure): (.+)", complaint)
    lines = errors or complaint.strip().splitlines()[:1] or ["no reason given"]
    return str(lines[-1]).removeprefix("Batch job submission failed: ").removeprefix("sbatch: ")


@contextlib.contextmanager
def outside_any_job() -> Iterator[None]:
    """Without the SLURM_* variables of a job this command may run in: sbatch and the new job would take them over."""
    inherited = [key for key in os.environ if key.startswith(("SLURM_", "SLURMD_")) and key != "SLURM_CONF"]
    hidden = {key: os.environ.pop(key) for key in inherited}
    try:
        yield
    finally:
        os.environ.update(hidden)
