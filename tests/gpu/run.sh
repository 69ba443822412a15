#!/usr/bin/env bash
# The recipe on a machine with one GPU, Python 3.12 and PyTorch and nothing else; no network. Nine minutes at most.
#
#   bash tests/gpu/run.sh PARTS RESULTS     # the folder that bundle.sh made, and a new one
#
# The most telling step comes first, each has a limit, and RESULTS/results.jsonl and summary.txt have what it found before
# the next one begins. DEVICE=cpu is the rehearsal (rehearse.sh): the same on a CPU, smaller, with PATIENCE times the limits.
set -uo pipefail
export DEVICE=${DEVICE:-cuda} RESULTS
parts=$(realpath "$1") RESULTS=$(realpath -m "$2") patience=${PATIENCE:-1}
CDPATH='' cd "$(dirname "$0")/../.." || exit
root=${TCOD_GPU_ROOT:-/tmp/tcod_gpu} machine=$(command -v python3)
deadline=$((SECONDS + 540 * patience))
mkdir -p "$RESULTS/work" "$root"

say() { echo "$(date +%T) $*" | tee -a "$RESULTS/summary.txt"; }

# An environment with the machine's PyTorch, what belongs to it, and the bundle: nothing else of the machine's packages.
unpack() {
  (cd "$parts" && sha256sum --quiet -c sums) || return
  "$machine" -m venv --without-pip "$root/env" && site=$(echo "$root"/env/lib/python3.*/site-packages) || return
  cat "$parts"/part.* | "$machine" -c "
import sys, tarfile
tarfile.open(fileobj=sys.stdin.buffer, mode='r|xz').extractall('$root', filter='fully_trusted')" || return
  mv "$root"/site/* "$site" || return
  "$machine" -W ignore - "$site" <<'END'
import pathlib, sys, torch
site = pathlib.Path(sys.argv[1])
for name in ("torch", "torchgen", "functorch", "triton", "nvidia", "cuda", "torch-*", "triton-*", "nvidia_*", "cuda_*"):
    for path in pathlib.Path(torch.__file__).parent.parent.glob(name):
        if not (site / path.name).exists():
            (site / path.name).symlink_to(path)
END
  "$root/env/bin/python3" -m compileall -q -j 0 "$site" "$root/slime" "$root/megatron" >/dev/null 2>&1
  true
}

step() { # NAME LIMIT COMMAND..
  local left=$((deadline - SECONDS)) limit=$(($2 * patience)) begun=$SECONDS
  if ((left < limit / 3)); then say "$1: not begun, $left s are left"; return; fi
  timeout -k 20 $((left < limit ? left : limit)) "${@:3}" >"$RESULTS/$1.log" 2>&1
  local status=$?
  say "$1: $([[ $status == 0 ]] && echo passed || echo "FAILED ($status), see $1.log") after $((SECONDS - begun)) s"
  if ((status)); then tail -n 5 "$RESULTS/$1.log"; fi
}

say "$(git log -1 --format=%h 2>/dev/null || echo no commit) on $(nvidia-smi -L 2>/dev/null || echo a CPU)"
if [[ ! -e $root/unpacked ]]; then
  if ! unpack; then say "the bundle: FAILED"; exit 1; fi
  touch "$root/unpacked"
  say "unpacked after $SECONDS s"
fi
unset SGLANG_USE_CPU_ENGINE PYTHONHOME
site=$(echo "$root"/env/lib/python3.*/site-packages)
export PATH=$root/env/bin:$site/bin:$PATH SLIME_DIR=$root/slime MEGATRON_DIR=$root/megatron HOME=$root/home PYTHONPATH=$PWD
# CUDA as PyTorch and the driver have it, for what is preloaded to save memory, and for what engines compile.
export LD_LIBRARY_PATH=$site/nvidia/cu13/lib:$root/driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export CPATH=$site/nvidia/cu13/include LIBRARY_PATH=$root/driver
mkdir -p "$HOME" "$root/driver"
ln -sf "$("$machine" -c "
import ctypes
ctypes.CDLL('libcuda.so.1')
print(next(line.split()[-1] for line in open('/proc/self/maps') if 'libcuda.so' in line))" 2>/dev/null)" "$root/driver/libcuda.so" 2>/dev/null
if [[ $DEVICE == cpu ]]; then PYTHONPATH=$PWD/smoke/stubs:$PWD; fi # the bundle's kernels are for GPUs
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0
declare -A limits=([kernels]=90 [engines]=180 [colocated]=220 [megatron]=110 [async]=100 [fully_async]=100)
for name in ${STEPS-kernels engines colocated megatron async fully_async}; do
  case $name in
    kernels) module=rehearsal ;;
    engines) module=engines ;;
    *) module=steps ;;
  esac
  step "$name" "${limits[$name]}" python3 -m "tests.gpu.$module" "$name"
done
rm -rf "$RESULTS/work"
cat "$RESULTS/results.jsonl" 2>/dev/null
! grep -q FAILED "$RESULTS/summary.txt"
