"""What run_qwen3_8b_tcod.sh does with its commands. It calls this with its settings as variables:

    python3 -P -m examples.tcod.tools.launch [the teacher's command] -- train.py's command

1. Settings that contradict each other (launch_settings.py) or do not fit the machine (launch_machine.py) are refused,
   with one sentence that names the variable and the fix.
2. RUN_DIR gets tcod.yaml, which is CONFIG with the variables' values in it, and a folder of logs.
3. preflight.py checks settings, data and models. The teacher starts, and preflight.py checks it too.
4. train.py runs. Its log is shown until it ends. If the teacher ends before, so does the run.

At the end, on an error and on a signal, everything that was started here is ended, and nothing else (processes.py).
With DRY_RUN=1 the commands are printed and nothing is started.
"""

import json
import os
import random
import re
import shlex
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import requests
import yaml

from .. import PACKAGE
from .launch_machine import check_files, check_machine, check_space, last_checkpoint, lock, output, visible_gpus
from .launch_settings import Settings, check_settings, recipe_settings, refuse, require
from .processes import Process, Supervisor, tail
from .secrets import without_secrets

# What slime's processes need on every node, beside WORKER_ENV and all of NCCL_*, GLOO_* and WANDB_*.
WORKER_VARIABLES = (
    "PYTHONPATH",
    "TCOD_RUN_DIR",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_DEVICE_ORDER",
    "PYTHONUNBUFFERED",
    "no_proxy",
)
TEACHER_KEY = "TCOD_TEACHER_API_KEY"
SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)  # in the name of a variable that is not printed


@dataclass(frozen=True)
class Commands:
    """What is started, with the variables that it alone gets."""

    teacher: list[str]  # empty: none is started
    teacher_gpus: str  # CUDA_VISIBLE_DEVICES
    train: list[str]
    train_env: dict[str, str]


def main() -> None:
    separator = sys.argv.index("--")
    settings = Settings.read()
    check_settings(settings, sys.argv[separator + 1 :])
    recipe = recipe_settings(settings)
    export_variables()
    gpus = visible_gpus()
    commands = make_commands(settings, gpus, sys.argv[1:separator], sys.argv[separator + 1 :])
    text = as_shell(settings, recipe, commands)
    if settings.dry_run == "1":
        print(text, end="")
        return
    check_files(settings, bool(commands.teacher))
    # A run that goes on has the teacher's port, too. A RUN_DIR is made when all is well.
    locks = [lock(settings.run_dir)] if settings.run_dir.is_dir() else []
    check_machine(settings, gpus, bool(commands.teacher))
    checkpoint = last_checkpoint(settings, recipe)
    check_space(settings)
    locks = locks or [lock(settings.run_dir)]
    # Ray's workers, and python3 -m, look for modules in the current folder first: not in one that hides some.
    os.chdir(settings.slime_dir)
    with locks[0], Supervisor() as supervisor:
        logs = prepare_run_dir(settings, recipe, text, checkpoint)
        check_before_gpus(supervisor, settings, commands)
        teacher = start_teacher(supervisor, settings, commands, logs) if commands.teacher else None
        if settings.teacher == "sglang":
            check_teacher(supervisor, settings)
        train(supervisor, settings, commands, teacher, logs)


# ----------------------------------------------------------------------------------------------------------- commands


def export_variables() -> None:
    """Set the variables of all that is started here."""
    for field in fields(Settings):  # an empty WANDB_PROJECT would be one to wandb
        if os.environ.get(field.name.upper()) == "":
            del os.environ[field.name.upper()]
    here = ["localhost", "127.0.0.1", *output("hostname", "-I").split()]  # engines and teacher
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join([*here, others] if others else here)


def make_commands(s: Settings, gpus: list[str], teacher: list[str], train: list[str]) -> Commands:
    def visible(numbers: Iterable[int]) -> str:
        return ",".join(gpus[number] if number < len(gpus) else str(number) for number in numbers)

    if s.ray_address:
        train_env = {"RAY_ADDRESS": s.ray_address}
    else:  # Ray starts here, even beside another one, on the GPUs of training and rollouts.
        train_env = {"RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": visible(range(s.local_gpus()))}
    return Commands(teacher, visible(s.teacher_numbers()) if teacher else "", train, train_env)


def as_shell(s: Settings, recipe: dict[str, Any], commands: Commands) -> str:
    """All of it as lines for a shell, without keys."""
    run_dir, slime_dir = shlex.quote(str(s.run_dir)), shlex.quote(str(s.slime_dir))
    lines = [f"mkdir -p {run_dir}", f"cat >{run_dir}/tcod.yaml <<'END'", to_yaml(recipe) + "END"]
    names = [name for name in (*WORKER_VARIABLES, *s.worker_env.split()) if name in os.environ]
    lines += exports({name: os.environ[name] for name in names if not SECRET.search(name)})
    lines.append(f"cd {slime_dir}")
    if commands.teacher:
        lines.append(f"CUDA_VISIBLE_DEVICES={commands.teacher_gpus} {shlex.join(commands.teacher)} &")
    lines += exports(commands.train_env)
    return "\n".join([*lines, without_secrets(shlex.join(commands.train)), ""])


def exports(variables: dict[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def to_yaml(recipe: dict[str, Any]) -> str:
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


# ------------------------------------------------------------------------------------------------------------ the run


def prepare_run_dir(s: Settings, recipe: dict[str, Any], text: str, checkpoint: str) -> Path:
    """Write the run's settings and commands. Returns the folder of this start's logs."""
    logs = s.run_dir / "logs" / time.strftime("%Y%m%d-%H%M%S")
    logs.mkdir(parents=True, exist_ok=True)
    if not checkpoint:  # whatever was here ended before its first one
        (s.run_dir / "wandb_run_id").unlink(missing_ok=True)
        for name in ("metrics.jsonl", "about.json", "rollouts"):
            if (s.run_dir / name).exists():
                (s.run_dir / name).rename(logs / f"before-{name}")
    (s.run_dir / "tcod.yaml").write_text(to_yaml(recipe))
    (logs / "command.sh").write_text(text)
    print(f"{s.run_dir} continues from checkpoint {checkpoint}" if checkpoint else f"{s.run_dir} starts")
    print(f"logs: {logs}")
    return logs


def preflight(supervisor: Supervisor, env: dict[str, str], *arguments: object) -> None:
    command = ["python3", "-P", "-m", f"{PACKAGE}.tools.preflight", *map(str, arguments)]
    if supervisor.run("preflight", command, env) != 0:  # it has said why
        sys.exit(1)


def check_before_gpus(supervisor: Supervisor, s: Settings, commands: Commands) -> None:
    options = ["--config", s.run_dir / "tcod.yaml", "--student", s.student, "--train", s.data_dir / "train.jsonl"]
    options += ["--eval", *s.eval_files().values()] if s.eval_files() else []
    options += ["--apply-chat-template-kwargs", s.chat_template_kwargs]
    options += ["--turn-len", s.max_turn_len, "--context-len", s.max_context_len]
    if s.teacher == "megatron":
        options += ["--megatron-teacher", s.teacher_model]
    if s.ray_address:
        options += ["--ray-gpus", s.train_gpus(), "--actor-gpus", s.train_gpus() - s.rollout_gpus]
        options += ["--engine-gpus", s.engine_gpus, "--node-gpus", s.node_gpus]
        options += ["--teacher-gpus", commands.teacher_gpus] if commands.teacher else []
    environment = ray_variables(s) if s.ray_address else {}
    preflight(supervisor, environment, "run", *options)


def check_teacher(supervisor: Supervisor, s: Settings) -> None:
    options = ["--url", f"{s.teacher_address()}/generate", "--student", s.student]
    options += ["--config", s.run_dir / "tcod.yaml"]
    options += ["--apply-chat-template-kwargs", s.chat_template_kwargs, "--context-len", s.max_context_len]
    preflight(supervisor, {}, "teacher", *options)


def start_teacher(supervisor: Supervisor, s: Settings, commands: Commands, logs: Path) -> Process:
    """Returns when the teacher generates."""
    print(f"starting the teacher on GPUs {commands.teacher_gpus}")
    env = {"CUDA_VISIBLE_DEVICES": commands.teacher_gpus}
    teacher = supervisor.start("teacher", commands.teacher, logs / "teacher.log", env)
    deadline = time.monotonic() + s.teacher_start_s
    session = requests.Session()
    session.trust_env = False  # no proxy
    while True:
        with suppress(requests.RequestException):
            if session.get(f"{s.teacher_address()}/health_generate", timeout=5).ok:
                return teacher
        if not teacher.running():
            teacher_failed(teacher, "ended before it was ready")
        if time.monotonic() > deadline:
            teacher_failed(teacher, f"was not ready within TEACHER_START_S={s.teacher_start_s} seconds")
        supervisor.pause(0.5)


def teacher_failed(teacher: Process, how: str) -> NoReturn:
    print(tail(teacher.log, 30), file=sys.stderr)
    refuse(f"the teacher {how}: above is the end of {teacher.log}")


def train(supervisor: Supervisor, s: Settings, commands: Commands, teacher: Process | None, logs: Path) -> None:
    """Run train.py to its end, with its log on the terminal."""
    log = logs / "train.log"
    os.environ |= tracking_variables(s)
    training = supervisor.start("training", commands.train, log, {**commands.train_env, **ray_variables(s)})
    shown = supervisor.start("tail", ["tail", "-n", "+1", "-f", f"--pid={training.popen.pid}", str(log)])
    while training.running():
        if teacher and not teacher.running():
            teacher_failed(teacher, "ended while it was needed")
        supervisor.pause()
    while shown.running():
        supervisor.pause()
    status = training.popen.returncode
    status = 128 - status if status < 0 else status  # as a shell counts: 128 + signal
    require(status == 0, f"training ended with status {status}: see {log}")


def tracking_variables(s: Settings) -> dict[str, str]:
    """wandb's run, the same after a resumption: slime passes no run id."""
    if not s.wandb_project:
        return {}
    file = s.run_dir / "wandb_run_id"
    if not file.is_file() or not file.read_text().strip():
        file.write_text(f"tcod-{int(time.time())}-{random.randrange(32768)}\n")
    return {"WANDB_RUN_ID": file.read_text().strip(), "WANDB_RESUME": "allow"}


def ray_variables(s: Settings) -> dict[str, str]:
    """How `ray job submit` hands its runtime environment to a program: as variables of all workers, on all nodes."""
    ours = {*WORKER_VARIABLES, *s.worker_env.split(), TEACHER_KEY}
    names = [name for name in os.environ if name in ours or name.startswith(("NCCL_", "GLOO_", "WANDB_"))]
    environment = {"runtime_env": {"env_vars": {name: os.environ[name] for name in names}}}
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(environment)}


if __name__ == "__main__":
    main()
