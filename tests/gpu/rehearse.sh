#!/usr/bin/env bash
# A rehearsal of run.sh, as unforgiving as the machine with the GPU, on a machine without one:
#
#   PYTHON=/path/to/env/bin/python3 bash tests/gpu/rehearse.sh PARTS RESULTS
#
# That environment has Python 3.12, PyTorch 2.11 and what PyTorch needs, nothing else; with nvcc (CUDA_HOME) the kernels
# are compiled as well. There is no network but loopback, and no home. As root, or where users may make namespaces.
set -euo pipefail
if [[ -z ${ALONE:-} ]]; then
  exec unshare --net --map-root-user env ALONE=1 PATIENCE="${PATIENCE:-10}" bash "$0" "$@"
fi
parts=$(realpath "$1") results=$(realpath -m "$2") here=$(cd "$(dirname "$0")" && pwd)
"$PYTHON" - <<'END' # `ip link set lo up`, where there is no ip
import fcntl, socket, struct
with socket.socket() as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS, IFF_UP and IFF_RUNNING
END
export TCOD_GPU_ROOT=$results/root HOME=$results/home DEVICE=cpu PATH=$(dirname "$PYTHON"):/usr/bin:/bin
export TCOD_TRACES=$results/traces
mkdir -p "$HOME" "$TCOD_TRACES"
cd "$here/../.."
STEPS='' bash tests/gpu/run.sh "$parts" "$results"  # unpacks
env=$TCOD_GPU_ROOT/env site=$(echo "$TCOD_GPU_ROOT"/env/lib/python3.*/site-packages)
cp "$here/rehearsal.py" "$site/tcod_trace.py"
echo 'import tcod_trace' >"$site/tcod_trace.pth"

# libcuda belongs to a driver: here it is a library of the names that are asked for.
mkdir -p "$results/driver"
nm -D --undefined-only "$site"/sgl_kernel/{.,sm90}/*.so | awk '$2 ~ /^cu[A-Z]/ {print "void " $2 "(void) {}"}' | sort -u |
  gcc -shared -Wl,-soname,libcuda.so.1 -x c - -o "$results/driver/libcuda.so.1"
LD_LIBRARY_PATH=$results/driver PATH=$env/bin:$site/bin:$PATH HOME=$results/home CUDA_VISIBLE_DEVICES='' \
  PYTHONPATH=$PWD:$TCOD_GPU_ROOT/slime:$TCOD_GPU_ROOT/megatron "$env/bin/python3" -m tests.gpu.rehearsal gpu
bash tests/gpu/run.sh "$parts" "$results"
machine=$("$PYTHON" -c 'import sys; print(sys.base_prefix, sys.prefix, sep=":")')
ALLOWED=$TCOD_GPU_ROOT:$PWD:$results:$machine:/proc:/sys:/dev:/etc:/tmp:/usr:/bin \
  "$env/bin/python3" -S -m tests.gpu.rehearsal traces "$results/traces"
