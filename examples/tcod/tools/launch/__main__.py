"""What run_qwen3_8b_tcod.sh does with its commands. It calls this with its settings as variables:

    python3 -P -m examples.tcod.tools.launch [the teacher's command] -- train.py's command -- the user's own flags

1. What contradicts itself or does not fit the machine is refused (variables.py).
2. RUN_DIR gets tcod.yaml, the settings, run.yaml, what the run is made of, and a folder of logs (folder.py).
3. preflight.py checks settings, data and models. The teacher starts, and preflight.py checks it too.
4. train.py runs. Its log is shown until it ends. If the teacher ends before, so does the run.

At the end, on an error and on a signal, everything that was started here is ended, and nothing else (processes.py).
With DRY_RUN=1 the commands are printed and nothing is started.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ... import PACKAGE
from ...settings.secrets import is_secret, text_without, without_secrets
from .folder import begin, lock, to_yaml
from .processes import Supervisor, no_proxy
from .variables import (
    Settings,
    check_machine,
    check_settings,
    eval_flags,
    output,
    read_tcod,
    require,
    teacher_context,
    visible_gpus,
)

# What slime's processes get on every node, beside WORKER_ENV and the variables in CONFIG's folders of data.
WORKER_VARIABLES = set(
    "PYTHONPATH TCOD_RUN_DIR TCOD_TEACHER_API_KEY PYTHONUNBUFFERED CUDA_DEVICE_MAX_CONNECTIONS CUDA_DEVICE_ORDER "
    "no_proxy NO_PROXY".split()
)
WORKER_PREFIXES = ("NCCL_", "GLOO_", "WANDB_")


def main() -> None:
    words = sys.argv[1:]
    sys.stdout.reconfigure(errors="backslashreplace")  # a log may have what the terminal's encoding lacks
    first = words.index("--")
    second = words.index("--", first + 1)
    try:
        with Supervisor() as supervisor:
            launch(supervisor, words[:first], words[first + 1 : second], words[second + 1 :])
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"launch: {error}")


def launch(supervisor: Supervisor, teacher: list[str], train: list[str], extra: list[str]) -> None:
    """All of it, from the checks to the end of training."""
    s = Settings.read(os.environ)
    check_settings(s, extra)
    tcod = read_tcod(s, os.environ)
    train = [*train, *eval_flags(s, tcod, extra), *extra]
    teacher = teacher and [*teacher, "--context-length", str(teacher_context(s, tcod))]
    os.environ.update(no_proxy(*output("hostname", "-I").split(), s.teacher_host))
    gpus = visible_gpus()
    for_teacher = {"CUDA_VISIBLE_DEVICES": pick(gpus, s.teacher_gpus)}
    for_train = {"RAY_ADDRESS": s.ray_address}
    if not s.ray_address:  # Ray starts here, even beside another one, on the GPUs of training and rollouts
        for_train = {"RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": pick(gpus, range(s.local_gpus))}
    commands = as_shell(s, tcod, (for_teacher, teacher), (for_train, train))
    if s.dry_run:
        return print(commands, end="")
    supervisor.enter_context(lock(s.run_dir))
    check_machine(s, gpus)
    logs = begin(s, tcod, commands)
    os.chdir(s.slime_dir)  # Ray's workers, and python3 -m, look for modules in the current folder first
    nodes = logs / "nodes.txt"  # is there when all is checked that needs no teacher
    check = ["python3", "-P", "-m", f"{PACKAGE}.tools.launch.preflight", str(nodes), *for_teacher.values()]
    checks = supervisor.start("preflight", check, env=for_workers(s, tcod) if s.ray_address else {})
    supervisor.wait(checks, until=nodes.exists)
    starts = teacher and nodes.exists()
    server = supervisor.start("the teacher", teacher, logs / "teacher.log", for_teacher) if starts else None
    supervisor.wait(checks, server)
    checks.stop()  # what it left behind
    if checks.popen.returncode != 0:  # it has said why
        sys.exit(1)
    os.environ.update(no_proxy(*nodes.read_text().split()))
    training = supervisor.start("training", train, logs / "train.log", {**for_train, **for_workers(s, tcod)})
    show = follow(training.log, tcod, train, dict(os.environ))
    supervisor.wait(training, server, until=show)
    show()
    status = training.popen.returncode
    status = status if status >= 0 else 128 - status  # as a shell counts: 128 + signal
    require(status == 0, f"training ended with status {status}: see {training.log}")


def pick(gpus: list[str], numbers: Iterable[int]) -> str:
    """CUDA_VISIBLE_DEVICES of these; where there are no GPUs, as in a dry run elsewhere, the numbers themselves."""
    return ",".join(gpus[number] if number < len(gpus) else str(number) for number in numbers)


def worker_variables(s: Settings, tcod: dict[str, Any]) -> dict[str, str]:
    """What slime's processes and the environment's workers get on every node."""
    for name in s.worker_env.split():
        require(os.environ.get(name), f"WORKER_ENV names {name}, which is not set: export it, or leave it out")
    of_data = re.findall(r"\$\{?(\w+)", f"{tcod.get('tcod_data_root')} {tcod.get('tcod_environments')}")
    names = {*WORKER_VARIABLES, *s.worker_env.split(), *of_data}
    return {name: text for name, text in os.environ.items() if name in names or name.startswith(WORKER_PREFIXES)}


def for_workers(s: Settings, tcod: dict[str, Any]) -> dict[str, str]:
    """How `ray job submit` hands its runtime environment to a program: as variables of all workers, on all nodes."""
    environment = {"runtime_env": {"env_vars": worker_variables(s, tcod)}}
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(environment)}


def as_shell(s: Settings, tcod: dict[str, Any], *commands: tuple[dict[str, str], list[str]]) -> str:
    """What does the same in a shell, without secrets; a command is the variables that it alone gets, and its words."""
    run_dir, slime_dir = shlex.quote(str(s.run_dir)), shlex.quote(str(s.slime_dir))
    lines = [f"mkdir -p {run_dir}", f"cat >{run_dir}/tcod.yaml <<'END'", to_yaml(without_secrets(tcod)) + "END"]
    lines += [f"export {word}" for word in assignments(worker_variables(s, tcod))]
    started = [" ".join([*assignments(v), shlex.join(without_secrets(words))]) for v, words in commands if words]
    return "\n".join([*lines, f"cd {slime_dir}", " &\n".join(started), ""])


def assignments(variables: dict[str, str]) -> list[str]:
    """NAME=VALUE of what is no secret."""
    public = without_secrets({name: text for name, text in variables.items() if not is_secret(name)})
    return [f"{name}={shlex.quote(text)}" for name, text in public.items()]


def follow(log: Path, *secrets: Any) -> Callable[[], None]:
    """A function that prints the lines that are new in the log, without the secrets that are in `secrets`."""
    file, rest = log.open(errors="replace"), ""

    def show() -> None:
        nonlocal rest
        lines, end, rest = (rest + file.read()).rpartition("\n")
        with suppress(OSError):  # nobody reads it any more
            print(text_without(lines, *secrets) if lines else "", end=end, flush=True)

    return show


if __name__ == "__main__":
    main()
