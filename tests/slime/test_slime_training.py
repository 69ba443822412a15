"""slime's own train.py on a CPU, against transformers and plain PyTorch: needs SLIME_DIR and MEGATRON_DIR.

Two iterations of an arm with the smoke run's models, games, engines and flags; what slime and Megatron made of the
first one is computed again from slime's own dump of the samples.
"""

import json
import os
import sys
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

if not (os.environ.get("SLIME_DIR") and os.environ.get("MEGATRON_DIR")):
    pytest.skip(
        "slime's train.py: run with SLIME_DIR=/path/to/slime MEGATRON_DIR=/path/to/Megatron-LM",
        allow_module_level=True,
    )

from examples.tcod.env_alfworld import AlfworldEnvironment
from smoke import hooks, make_games, make_models, plays, train_arm, train_slime
from smoke.servers import Process, SGLangServer
from smoke.slime_cpu import compare
from smoke.trainer import response_log_probs

LR = 5e-4


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    make_models.make_student(make_models.SHIPPED, folder, seed=5)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("games")
    make_games.make_games(root, 16, 4)
    return root


@pytest.fixture(scope="module")
def options(student, data, tmp_path_factory):
    """options(name, **settings) -> (the run directory, the options) of two iterations of an arm; engines are up."""
    logs = tmp_path_factory.mktemp("logs")
    with (
        SGLangServer("student server", student, logs / "student.log") as engine,
        SGLangServer("teacher server", make_models.SHIPPED, logs / "teacher.log") as teacher,
    ):
        engine.wait_ready()
        teacher.wait_ready()

        def of(name, **settings):
            run_dir = tmp_path_factory.mktemp(name)
            settings = plays.settings_of("alfworld", name, tcod_data_root=str(data), **settings)
            config = plays.write_settings(run_dir / "tcod.yaml", settings)
            chosen = ["--config", str(config), "--run-dir", str(run_dir)]
            chosen += ["--student", str(student), "--data", str(data)]
            chosen += ["--student-port", str(engine.port), "--teacher-port", str(teacher.port)]
            return run_dir, [*chosen, "--updates", "2", "--batch", "8", "--lr", str(LR), "--skip-first-evaluation"]

        yield of


@pytest.fixture(scope="module")
def arm(options):
    """arm(name, *further options, **settings) -> the run directory of two iterations."""

    def run(name, *further, **settings):
        run_dir, chosen = options(name, **settings)
        command = [sys.executable, "-m", "smoke.train_slime", *chosen, *further]
        env = {"PYTHONPATH": hooks.python_path()}
        with Process(name, command, run_dir / "train.log", env) as process:
            process.popen.wait()
            process.check()
        return run_dir

    return run


def checked(run_dir, student, **flags):
    """The lines of a run's metrics, whose first step is what plain PyTorch computes."""
    differences = compare.compare(run_dir, student, LR, **flags)
    assert max(differences.values()) < compare.TOLERANCE, differences
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_teacher_in_megatron(arm, student):
    """What slime has paused is NaN here. It pushes copies: of the student at the start, and of what it trained."""
    run_dir = arm("f2b", "--teacher", str(make_models.SHIPPED), tcod_eval_kl=False)
    lines = checked(run_dir, student, teacher=make_models.SHIPPED)
    for step in (0, 1):  # the engine has the weights that are trained
        logged = compare.logged_step(run_dir / "train.log", step)
        assert logged["train/train_rollout_logprob_abs_diff"] < 1e-4
    assert lines[0]["rollout/tcod/tokens/scored"] == 0 and "rollout/tcod/kl/trajectory" not in lines[0]


def test_without_shared_gpus_the_teacher_in_megatron_pushes_what_is_paused(options, student):
    """On GPUs such a push reads memory that is not there; here it is NaN. The recipe refuses the flags by then."""
    run_dir, chosen = options("f2b", tcod_eval_kl=False)
    chosen = Namespace(**vars(train_arm.option_parser().parse_args(chosen)), data_parallel=1)
    settings = {**train_slime.model_settings(student), **train_slime.slime_settings(chosen)}
    settings |= {"opd-type": "megatron", "opd-teacher-load": make_models.SHIPPED, "rm-url": False}
    settings |= {**train_slime.CPU_SETTINGS, "offload-train": True}
    command = [sys.executable, "-m", "smoke.slime_cpu.run_train", *train_slime.as_flags(settings)]
    env = {"PYTHONPATH": hooks.python_path(os.environ["MEGATRON_DIR"])}
    with Process("not colocated", command, run_dir / "train.log", env) as process:
        assert process.popen.wait() != 0
    assert "--opd-type megatron needs --colocate" in process.log.read_text()
    [file] = (run_dir / "weights/weight_v000001").glob("*.safetensors")
    assert all(value.isnan().any() for value in load_file(file).values())


@pytest.mark.parametrize("ranks, loss, history", [(2, "token", "append"), (1, "trajectory", "turns")])
def test_the_first_step_of_imitation(arm, data, student, ranks, loss, history):
    """On whatever the environment says in the demonstrations; with no request to an engine before the evaluation."""
    plays.record(data, plays.settings_of("alfworld", "sft", tcod_data_root=str(data)))
    run_dir = arm("sft", "--data-parallel", str(ranks), "--loss", loss, tcod_history=history)
    lines = checked(run_dir, student, loss=loss, **train_arm.IMITATION)
    assert [(line["kind"], line["n"]) for line in lines] == [("rollout", 0), ("rollout", 1), ("eval", 2)]
    assert lines[0]["rollout/tcod/failed"] == 0 < lines[0]["rollout/tcod/tokens/trained"]
    assert lines[0]["rollout/tcod/samples"] == 8 or history == "turns"


@pytest.mark.parametrize("alone, ranks, history", [(True, 2, "turns"), (False, 1, "append")])
def test_the_first_step_with_a_reward(arm, student, alone, ranks, history):
    """Beside the KL, and alone: groups of equals are replaced, so not all of the first ones are trained."""
    signal = {"tcod_reward_coef": 0.5, **({"tcod_eval_kl": False} if alone else {})}
    options = ["--samples", "4", "--batch", "4", "--data-parallel", str(ranks), *(["--no-teacher"] if alone else [])]
    options += ["--updates", "1"]  # at this learning rate the reward alone may leave a second one without a signal
    run_dir = arm("b2f", *options, tcod_history=history, tcod_max_replacements=50, **signal)
    line, *_ = checked(run_dir, student, n_samples_per_prompt=4, **(train_arm.ALONE if alone else {}), **signal)
    assert ("rollout/tcod/kl/trajectory" in line) != alone and 0 < line["rollout/tcod/success"] <= 1 - 0.01 * alone


@pytest.mark.parametrize(
    "name, ranks, loss, settings",
    [
        ("f2b", 2, "turn", {}),
        ("b2f", 1, "token", {"tcod_teacher_sees": ["demo", "hindsight"], "tcod_note_len": 2000}),
        ("f2b", 2, "trajectory", {"tcod_history": "turns"}),
    ],
)
def test_the_first_step_is_what_plain_torch_computes(arm, student, name, ranks, loss, settings):
    """The third loss, slime's own, is that of the test above, too. In turns an episode is several samples."""
    run_dir = arm(name, "--data-parallel", str(ranks), "--loss", loss, **settings)
    if "tcod_teacher_sees" in settings:
        check_scores_behind_a_note(run_dir, make_models.SHIPPED)
    lines = checked(run_dir, student, loss=loss)
    assert [(line["kind"], line["n"]) for line in lines] == [("rollout", 0), ("rollout", 1), ("eval", 2)]
    assert lines[1]["rollout/tcod/k"] == {"f2b": 5, "b2f": 1}[name]
    assert lines[0]["train_s"] == 0 < lines[1]["train_s"] and (run_dir / "rollouts/train_000001.jsonl").exists()
    assert 0 <= lines[2]["eval/tcod/heldout/success"] <= 1 and lines[2]["eval/tcod/heldout_t1/kl/trajectory"] > 0


def test_the_students_own_engine_scores_through_the_router(arm, student):
    note = {"tcod_teacher_sees": ["demo"], "tcod_note_len": 2000, "tcod_eval_kl": False}
    run_dir = arm("f2b", "--teacher-port", "0", **note)
    check_scores_behind_a_note(run_dir, student)
    lines = checked(run_dir, student)
    assert lines[0]["rollout/tcod/note_demo"] == 1 and abs(lines[0]["rollout/tcod/kl/trajectory"]) > 1e-3


def test_several_environments(arm, student, tmp_path, monkeypatch):
    """ALFWorld and questions about databases in one batch, each with its own rules, tools and horizon."""
    monkeypatch.setattr(plays.shutil, "which", lambda name: None)  # with ScienceWorld it would take longer
    given = {"environment": "mixed", "config": None, "variant": ["f2b"], "thoughts": False, "out": tmp_path}
    play = plays.choose(Namespace(**given, train_games=8, heldout_games=4))
    config = plays.write_settings(tmp_path / "tcod.yaml", play.arms["f2b"])
    run_dir = arm("f2b", *play.flags, "--config", str(config), "--data", str(play.data))
    differences = compare.compare(run_dir, student, LR)
    assert max(differences.values()) < compare.TOLERANCE, differences
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["n"]) for line in lines] == [("rollout", 0), ("rollout", 1), ("eval", 2)]
    for names, count in (("rollout/tcod", 8), ("rollout/tcod", 8), ("eval/tcod/heldout", 8)):
        line = lines.pop(0)
        played = [line[f"{names}/by_environment/{name}/episodes"] for name in ("alfworld", "sqlite")]
        assert sum(played) == count and min(played) > 0
    saved = list(map(json.loads, (run_dir / "rollouts/train_000001.jsonl").read_text().splitlines()))
    first = {one["environment"]: one["turns"][0]["context"][0] for one in saved}
    assert '"name": "list_tables"' in first["sqlite"] and "list_tables" not in first["alfworld"]


def check_scores_behind_a_note(run_dir, teacher):
    """What slime has trained on are transformers' scores behind the note that was saved with the episode."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    lines = map(json.loads, (run_dir / "rollouts/train_000000.jsonl").read_text().splitlines())
    saved = {line["index"]: line for line in lines}
    samples = [
        sample for sample in compare.dumped_samples(run_dir, None, hooks.rollout_args()) if sample.index in saved
    ]
    assert samples
    for sample in samples:
        first, note = (saved[sample.index]["turns"][0]["observation"], saved[sample.index]["note"]["text"])
        heads = [
            tokenizer.apply_chat_template(
                [
                    {"role": "system", "content": AlfworldEnvironment.system_prompt({})},
                    {"role": "user", "content": text},
                ],
                add_generation_prompt=True,
                return_dict=False,
                enable_thinking=False,
            )
            for text in (first, "\n\n".join([first, "\n".join(note)]))
        ]
        assert sample.tokens[: len(heads[0])] == heads[0] and len(heads[1]) > len(heads[0]) + 50
        with torch.no_grad():
            ids = heads[1] + sample.tokens[len(heads[0]) :]
            scores = response_log_probs(model, ids, sample.response_length)
        assert sample.teacher_log_probs == pytest.approx(scores.tolist(), abs=1e-3)
