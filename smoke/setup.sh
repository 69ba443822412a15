# shellcheck shell=bash
# Sourced by the run.sh of smoke, tests and benchmarks: makes the pinned virtual environment (.venv, or $TCOD_VENV) where
# it is not there yet, sets $python, and goes to the repository's root. The caller has `set -euo pipefail`.

_root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for _name in TCOD_VENV SLIME_DIR MEGATRON_DIR; do
  if [[ -n ${!_name:-} ]]; then export "$_name=$(realpath -m "${!_name}")"; fi
done
_venv=${TCOD_VENV:-$_root/.venv}
python=$_venv/bin/python

_fail() {
  echo "$*" >&2
  exit 1
}

if [[ $_venv == *[[:space:]]* ]]; then
  _fail "Ray cannot start its workers from $_venv, whose path has a space: set TCOD_VENV=/a/path/without/one"
fi

_base_python() {
  local names=(python3.11 python3.12 python3.13 python3) name
  if [[ -n ${PYTHON:-} ]]; then names=("$PYTHON"); fi
  for name in "${names[@]}"; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  _fail "no Python from 3.11 to 3.13 among ${names[*]}: install one, or name it: PYTHON=/path/to/python3.12 bash $0"
}

# ALFWorld's planner is built from source; Debian's Python comes without venv and headers.
_system_packages() {
  local missing=() tool version
  version=$("$1" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
  for tool in cmake make g++; do
    command -v "$tool" >/dev/null || missing+=("$tool")
  done
  "$1" -c 'import ensurepip, venv' 2>/dev/null || missing+=("$version-venv")
  "$1" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' ||
    missing+=("$version-dev")
  if ((${#missing[@]} == 0)); then return; fi
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    _fail "missing: ${missing[*]}; install them first, on Debian or Ubuntu: sudo apt-get install -y ${missing[*]}"
  fi
  apt-get update -q && apt-get install -q -y "${missing[@]}"
}

# What slime imports beside the recipe is installed where there is a slime.
_requirements=(requirements.txt)
if [[ -n ${SLIME_DIR:-} ]]; then _requirements+=(requirements-slime.txt); fi
_stamp=$(CDPATH='' cd "$_root/smoke" && sha256sum "${_requirements[@]}")
if [[ $(cat "$_venv/.installed" 2>/dev/null) != "$_stamp"* ]]; then
  echo "setting up $_venv (once, a few minutes)"
  _started=$SECONDS
  _base=$(_base_python)
  _system_packages "$_base"
  "$_base" -m venv "$_venv"
  # --no-compile: most of these files are never imported here.
  _pip=("$python" -m pip --disable-pip-version-check install --no-user --quiet --no-compile)
  # The default Linux build of PyTorch brings several GB of CUDA libraries. The smoke run needs none of them: point
  # PIP_EXTRA_INDEX_URL at PyTorch's CPU wheels to do without.
  "${_pip[@]}" torch==2.13.0
  for _file in "${_requirements[@]}"; do "${_pip[@]}" --no-deps -r "$_root/smoke/$_file"; done
  # The first import of these compiles them, which takes a minute: once here, not in the first run.
  PYTHONPATH=$_root SGLANG_USE_CPU_ENGINE=1 "$python" -W ignore -c "
from smoke import cpu_only; cpu_only.prepare()
import sglang.launch_server, sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler
import sglang.srt.managers.detokenizer_manager, sglang.srt.models.registry, transformers.models.qwen3.modeling_qwen3
import alfworld.agents.environment.alfred_tw_env, matplotlib.pyplot, ray, textworld.envs" >"$_venv/import.log" 2>&1 ||
    _fail "what was installed does not import: see $_venv/import.log"
  echo "$_stamp" >"$_venv/.installed"
  echo "set up in $((SECONDS - _started)) s"
fi

# The root is the one place that our packages are imported from. It is the working directory too, because Python and
# Ray's workers look there first, and a checkout of slime has a package `examples` of its own.
cd "$_root"
export PYTHONUTF8=1 PYTHONPATH=$_root${PYTHONPATH:+:$PYTHONPATH}

# Nothing that talks to this machine itself may go by a proxy. Some programs read one spelling first, some the other.
no_proxy=$(echo localhost 127.0.0.1 ::1 "$(hostname -I 2>/dev/null)" "${no_proxy:-}" "${NO_PROXY:-}" | tr -s ', ' '\n')
no_proxy=$(sort -u <<<"$no_proxy" | paste -sd,)
export no_proxy NO_PROXY=$no_proxy
