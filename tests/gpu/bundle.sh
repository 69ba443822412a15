#!/usr/bin/env bash
# What a bare machine with Python 3.12 and PyTorch 2.11 (CUDA 13) lacks for run.sh, in parts of at most 55 MiB:
#
#   SLIME_DIR=/path/to/slime MEGATRON_DIR=/path/to/Megatron-LM bash tests/gpu/bundle.sh FOLDER
#
# FOLDER gets part.00, part.01, .., the checksums of all (sums), and contents.txt: what is in it, and why. Nothing of it
# belongs into the repository. PYTHON names the Python 3.12, whose pip brings the packages.
set -euo pipefail
out=$(realpath -m "$1") python=${PYTHON:-python3.12}
slime=$(realpath "${SLIME_DIR:?must be a checkout of slime}")
megatron=$(realpath "${MEGATRON_DIR:?must be a checkout of Megatron-LM}")
CDPATH='' cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/bundle/slime" "$work/bundle/megatron" "$work/bundle/site"

# Left out: of the packages, what only development, tables and ScienceWorld use, what PyTorch brings, and pyarrow with
# what needs it, which wants NumPy 2 where slime wants 1; of what is installed, what nothing on the way opens.
other='black|isort|ruff|pytest|pytest-xdist|hypothesis|execnet|iniconfig|pluggy|pathspec|mypy_extensions|scienceworld|py4j'
other+='|matplotlib|contourpy|kiwisolver|cycler|fonttools|pyparsing|sortedcontainers|hf-xet|torchvision|triton|numpy|pandas'
other+='|pyarrow|datasets|tensorboard|tensorboard-data-server|jedi|parso'
unused=(
  sgl_kernel/sm100 sgl_kernel/flash_ops.abi3.so sgl_kernel/flashmla_ops.abi3.so # other GPUs, other attention: 1.8 GB
  wandb/bin                                                                     # the program that uploads
  ray/{rllib,serve,tune,jars,cpp,dashboard/client}                              # Ray's libraries, Java, C++
)
grep -hvE "^(#|($other)==)" smoke/requirements.txt smoke/requirements-slime.txt >"$work/requirements.txt"
"$python" -m pip install --quiet --no-deps --no-compile --target "$work/bundle/site" \
  -r "$work/requirements.txt" -r tests/gpu/requirements.txt
(cd "$work/bundle/site" && rm -rf "${unused[@]}")
find "$work/bundle/site" -type d -name tests -prune -exec rm -rf {} +
find "$work/bundle/site" -type f -size +500k -not -path '*.libs/*' -exec strip --strip-unneeded {} + 2>/dev/null || true
cp -r "$slime"/{slime,slime_plugins,scripts,train.py,train_async.py} "$work/bundle/slime"
cp -r "$megatron"/{megatron,*.py} "$work/bundle/megatron"
find "$work/bundle" -name __pycache__ -prune -exec rm -rf {} +

{
  echo "slime, megatron: the checkouts' code. site: smoke/requirements.txt for the recipe, SGLang, Ray and ALFWorld,"
  echo "smoke/requirements-slime.txt for slime and Megatron-LM, tests/gpu/requirements.txt for GPUs. Left out of it:"
  echo "${other//|/ }"; echo "${unused[*]}"; echo "KB, by folder:"
  (cd "$work/bundle" && du -sk slime megatron site/* | sort -rn)
} >"$out/contents.txt"
rm -f "$out"/part.*
tar -C "$work/bundle" -cf - . | xz -T0 -3 | split -d -b 55M - "$out/part."
(cd "$out" && sha256sum part.* >sums)
ls -l "$out"
