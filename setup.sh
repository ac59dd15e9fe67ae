#!/usr/bin/env bash
# ./setup.sh [bench|test]: makes .venv with everything Barlow needs; with `bench` also the peers it is compared with,
# with `test` these and what its tests need, SLURM included.
# Takes about two minutes on a fresh machine, nothing the second time. Installs system packages only as root on Debian or
# Ubuntu; otherwise it prints the line to run.
set -euo pipefail
cd "$(dirname "$0")"
what=${1:-run}
python=${PYTHON:-python3}
ready=.venv/.ready-$what
stamp=$("$python" -V 2>&1; cat pyproject.toml setup.sh)
if [ -f "$ready" ] && [ "$(cat "$ready")" = "$stamp" ]; then exit 0; fi

missing=()
need() { missing+=("$@"); }                            # Debian packages for what a probe does not find
pkg-config --exists opencv4 libturbojpeg 2>/dev/null || need libopencv-dev libturbojpeg0-dev pkg-config
command -v g++ >/dev/null || need g++
"$python" -c 'import os, sysconfig; assert os.path.exists(sysconfig.get_paths()["include"] + "/Python.h")' 2>/dev/null || need python3-dev
first=()
uv --version >/dev/null 2>&1 || "$python" -c 'import ensurepip, venv' 2>/dev/null || first=(python3-venv)
if [ "$what" = test ]; then
    for program in slurmctld slurmd sbatch; do command -v $program >/dev/null || [ -x /usr/sbin/$program ] || { need slurm-wlm; break; }; done
    command -v munged >/dev/null || [ -x /usr/sbin/munged ] || need munge
fi

system_packages() {
    [ $# -gt 0 ] || return 0
    echo "installing $*"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >"$log" 2>&1 || { tail -20 "$log" >&2; return 1; }
}

if [ ${#first[@]} -gt 0 ] || [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "error: system packages are missing; run: sudo apt-get update && sudo apt-get install -y --no-install-recommends ${first[*]:-} ${missing[*]:-}" \
            "  (environment.yml needs no root)" >&2
        exit 2
    fi
    log=$(mktemp)
    trap 'wait; rm -f "$log"' EXIT                     # whatever fails, apt is not left half way
    apt-get update -qq
fi
system_packages "${first[@]}"
system_packages "${missing[@]}" & apt=$!               # side by side with Python's packages

if uv --version >/dev/null 2>&1; then
    uv=uv
    [ -x .venv/bin/python ] || uv venv -q --python "$python" .venv
else
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install -q uv
    uv=.venv/bin/uv
fi
install() { "$uv" pip install -q --python .venv/bin/python "$@"; }
echo "installing Python packages into .venv"
install 'torch>=2.9' torchvision timm numba opencv-python       # the large ones, while the system's packages arrive
wait "$apt"
case $what in
    test) install -e '.[dev,bench]' ;;
    bench) install -e '.[bench]' ;;
    *) install -e . ;;
esac
.venv/bin/python -c 'import ffcv, torch'
[ "$what" != test ] || printf '%s' "$stamp" >.venv/.ready-bench
printf '%s' "$stamp" | tee .venv/.ready-run >"$ready"
echo "ready: .venv"
