"""Start SGLang's own server, with SGLang's arguments.

    python -m smoke.serve --model-path DIR --device cpu ...

On a CPU, what a GPU installation has and a laptop lacks is never called: see cpu_only.py. With SMOKE_DEVICE=cuda, in
an installation for GPUs, all layers but attention are PyTorch's operations: SGLang's kernels are made for half
precision and for larger heads than the smoke run's models have.
Beside that, the server answers GET /workers as slime's router does, so that one engine does without a router.

It is also the teacher of the run script's tests, where slime and its package `examples` come first on the import path:
so nothing here, or in what it imports, needs the recipe.
"""

import ctypes
import multiprocessing
import os
import signal
import sys

from smoke import cpu_only

ON_GPU = os.environ.get("SMOKE_DEVICE") == "cuda"  # servers.py checks it

# At module level, because spawned children run it too.
if ON_GPU:
    os.environ["SGLANG_USE_CPU_ENGINE"] = "0"
    os.environ["TRITON_F32_DEFAULT"] = "ieee"  # Triton's own default for float32 is TF32
    from sglang.srt.layers.utils import MultiPlatformOp

    MultiPlatformOp.dispatch_forward = lambda self: self.forward_native
else:
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    cpu_only.prepare()


def main() -> None:
    # If the launcher is killed outright, the server must not stay behind.
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    # SGLang spawns its processes, for CUDA's sake, and each imports everything anew: most of a start on a laptop.
    if not ON_GPU:
        use = multiprocessing.set_start_method
        multiprocessing.set_start_method = lambda method, force=False: use("fork", force=True)

    from sglang.launch_server import run_server
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    server_args = prepare_server_args(sys.argv[1:])

    @app.get("/workers")
    async def workers() -> dict:
        return {"workers": [{"url": server_args.url()}]}

    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
