"""What the pages tell people to type works, and their links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from barlow.config import Network, Shards
from barlow.recipes import FINETUNE
from tests.scripts import Answer, run_all

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = {"export", "sinfo", "squeue", "cp", "git", "cd", "tail", "sbatch"}  # said of the cluster tests, or plain shell


def commands() -> list[tuple[str, str]]:
    """Every line of every ```bash block, with its page."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
            found += [(page.name, line.split("  #")[0].strip()) for line in block.splitlines() if line.strip()]
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands for any run that is named after --from: a classifier's, on data that are elsewhere."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    config = replace(FINETUNE["shapes"], model=Network("resnet10t", "small", 0.25), data=Shards(dir="/elsewhere"))
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step-000000001.pt").touch()
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    return folder


@pytest.fixture(scope="module")
def answers(trained: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """What becomes of each line that begins with python, harmless as it is made here."""
    folder = tmp_path_factory.mktemp("docs")
    lines = {line: harmless(line, folder, trained, tiny_data) for _, line in commands() if "python" in line.split()}
    return dict(zip(lines, run_all(list(lines.values())), strict=True))


def harmless(line: str, folder: Path, trained: Path, tiny_data: Path) -> list[str]:
    """The words after python, for a dry run where there is one, else for --help."""
    words = shlex.split(line)
    words = words[words.index("python") + 1 :]
    words = [word for word in words if word != "--dry-run" and word != "--follow"]
    if words[0] == "launchers/pretrain.py" and "--help" not in words:
        words = ["slurm/sites/default.toml" if word.endswith("my-cluster.toml") else word for word in words]
        return [*words, "--dry-run", "--cluster", "local"]  # its flags, its recipe, its site file
    if "--from" in words:
        words[words.index("--from") + 1] = str(trained)
        return [*words, "--dry-run", "--cluster", "local"]
    if words[0] == "launchers/reproduce.py" and "--help" not in words:
        return [*words, "--dry-run", "--cluster", "local", "--data.dir", str(tiny_data), "--scale", "0.01"]
    if words[0] == "launchers/shards.py" and "--verify" not in words and ":" in words[1]:
        kind = words[1].split(":")[0]  # the page's DIR is not here: a reader of that kind is all that can be asked for
        return [words[0], f"{kind}:{folder}/nowhere", *words[2:]]
    return [*words, "--help"]


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_of_the_docs_is_one_that_works(page: str, line: str, request: pytest.FixtureRequest) -> None:
    words = shlex.split(line)
    while "=" in words[0]:
        words.pop(0)
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "python":
        answer = request.getfixturevalue("answers")[line]
        if "nowhere" in answer.told:
            assert answer.code == 2
        else:
            assert answer.code == 0, answer.told
    else:
        assert words[0] in SHELL, f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_s_tree_names_every_file_and_no_other() -> None:
    tree = (ROOT / "README.md").read_text().split("```text\n", 1)[1].split("```", 1)[0]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    ours = {
        name
        for name in tracked
        if name.startswith(("barlow/", "slurm/", "launchers/", "benchmarks/")) and name[-3:] == ".py"
    }
    ours -= {name for name in ours if name.endswith("__init__.py")}
    named, folders = set(), {0: ""}
    for line in tree.splitlines():
        match = re.match(r"( *)([\w./-]+)", line)
        if not match:
            continue
        depth, name = len(match[1]), match[2]
        path = folders.get(depth, "") + name
        if name.endswith("/"):
            folders = {key: value for key, value in folders.items() if key <= depth} | {depth + 2: path}
        elif name.endswith(".py"):
            named.add(path)
    assert named >= ours, ours - named
    assert {name for name in named if not (ROOT / name).exists()} == set()
