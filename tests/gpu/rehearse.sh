#!/usr/bin/env bash
# A rehearsal of run.sh, as unforgiving as the machine with the GPU, on a machine without one:
#
#   PYTHON=/path/to/env/bin/python3 bash tests/gpu/rehearse.sh PARTS RESULTS
#
# That environment has Python 3.12, PyTorch 2.11 and what PyTorch needs, nothing else. With CUDA_HOME, a folder with
# bin/nvcc, a GPU's kernels are compiled too. There is no network but loopback, and an empty home. PATIENCE is how many
# times slower than its limits a step may be. As root, or where users may make namespaces.
set -euo pipefail
if [[ -z ${ALONE:-} ]]; then
  exec unshare --net --map-root-user env -i ALONE=1 PYTHON="$PYTHON" CUDA_HOME="${CUDA_HOME:-}" \
    PATIENCE="${PATIENCE:-10}" PATH=/usr/bin:/bin bash "$0" "$@"
fi
parts=$(realpath "$1") results=$(realpath -m "$2") root=$(realpath -m "$2")/root
CDPATH='' cd "$(dirname "$0")/../.."
"$PYTHON" - <<'END' # `ip link set lo up`, where there is no ip
import fcntl, socket, struct
with socket.socket() as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS, IFF_UP and IFF_RUNNING
END
export TCOD_GPU_ROOT=$root HOME=$results/home DEVICE=cpu PATH=${PYTHON%/*}:$PATH
mkdir -p "$HOME" "$root/driver"
STEPS='' bash tests/gpu/run.sh "$parts" "$results" # unpacks
env=$root/env site=$(echo "$root"/env/lib/python3.*/site-packages)

# libcuda belongs to a GPU's driver: here it is a library that knows of no GPU.
nm -D --undefined-only "$site"/sgl_kernel/{.,sm90}/*.so "$site"/torch_memory_saver_hook_mode_preload_cu13.* |
  awk '$2 ~ /^cu[A-Z]/ {print "int " $2 "(void) {return 999;}"}' | sort -u |
  gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -x c - -o "$root/driver/libcuda.so.1"
failed=0
PATH=$env/bin:$site/bin:$PATH PYTHONPATH=$PWD:$root/slime:$root/megatron \
  LD_LIBRARY_PATH=$site/nvidia/cu13/lib:$root/driver \
  "$env/bin/python3" -m tests.gpu.rehearsal gpu >"$results/gpu.log" 2>&1 || failed=1
grep -v -i warning "$results/gpu.log" | tail -n 20
bash tests/gpu/run.sh "$parts" "$results" || failed=1
if ((failed)); then echo "the rehearsal FAILED"; else echo "the rehearsal passed"; fi
exit "$failed"
