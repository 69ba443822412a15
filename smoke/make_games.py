"""Generate small, playable ALFWorld games offline, with planner demonstrations and dataset rows.

make_games writes game directories as ALFWorld's data has them (game.tw-pddl, initial_state.pddl, traj_data.json), and
train.jsonl and heldout.jsonl for the recipe. Only files shipped in the alfworld wheel are used: the PDDL domain, the
text grammar and the goal library. A game is a function of (task type, variant, seed), byte for byte.
"""

import functools
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.tcod.environments.textworld_speedup import speed_up_textworld

DATA_VERSION = "json_2.1.1"  # the folder name of the ALFWorld data
HELDOUT_SEED = 500_000  # first held-out seed; training seeds stay below it

# A room has every receptacle of the first list and some of the second.
KITCHEN = (
    ["CounterTop", "Cabinet", "Drawer", "Fridge", "Microwave", "SinkBasin"],
    ["CounterTop", "Cabinet", "Cabinet", "Drawer", "Drawer"],
)
BEDROOM = (
    ["Bed", "Desk", "Drawer", "Dresser", "Shelf", "SideTable"],
    ["Desk", "Drawer", "Drawer", "Shelf", "SideTable"],
)
MAX_ROOM = 9
FOOD = ["Apple", "Bread", "Egg", "Potato", "Tomato"]
DISHES = ["Bowl", "Cup", "Mug", "Plate"]
SMALL_THINGS = ["AlarmClock", "Book", "CD", "CellPhone", "CreditCard", "KeyChain", "Laptop", "Pen", "Pencil", "Watch"]
# task type -> (room, objects a task may be about)
TASKS = {
    "pick_and_place_simple": (KITCHEN, FOOD + DISHES + ["Fork", "SaltShaker", "Spoon"]),
    "look_at_obj_in_light": (BEDROOM, SMALL_THINGS),
    "pick_clean_then_place_in_recep": (KITCHEN, DISHES + ["Apple", "Fork", "Lettuce", "Potato", "Spoon", "Tomato"]),
    "pick_heat_then_place_in_recep": (KITCHEN, FOOD + ["Cup", "Mug", "Plate"]),
    "pick_cool_then_place_in_recep": (KITCHEN, FOOD + DISHES + ["Lettuce", "Pan"]),
    "pick_two_obj_and_place": (BEDROOM, SMALL_THINGS),
}
SIMPLE = "pick_and_place_simple"  # what the tiny models are made for
LAMP = "DeskLamp"
DISTRACTORS = 3
# Types that the domain's actions name must be declared even in rooms without them.
DOMAIN_RECEPTACLES = {"Fridge", "Microwave", "SinkBasin"}
DOMAIN_OBJECTS = {"ButterKnife", "Knife"}


def _holds(receptacle: str, obj: str) -> bool:
    from alfworld.gen.constants import VAL_RECEPTACLE_OBJECTS

    return obj in VAL_RECEPTACLE_OBJECTS[receptacle]


@functools.cache
def goals(task_type: str) -> list[tuple[str, str]]:
    """All (object, target receptacle) pairs of a task type; the target is "" for look_at_obj_in_light."""
    (always, _), objects = TASKS[task_type]
    if task_type == "look_at_obj_in_light":
        return [(obj, "") for obj in objects]
    # The object must fit its target and at least two other receptacles, one of which it starts in.
    return [
        (obj, target)
        for obj in objects
        for target in always
        if _holds(target, obj) and sum(_holds(r, obj) for r in always if r != target) >= 2
    ]


def _pddl_name(thor_id: str) -> str:
    for char, word in (("-", "minus"), ("|", "bar"), ("+", "plus"), (".", "dot"), (",", "comma")):
        thor_id = thor_id.replace(char, f"_{word}_")
    return thor_id


def _new_id(rng: random.Random, cls: str) -> str:
    place = "|".join(f"{rng.uniform(-3, 3):+06.2f}" for _ in range(3))
    # The sink has a compound id in THOR; any other spelling is displayed as "sinkbasinbasin".
    return _pddl_name(f"Sink|{place}|SinkBasin" if cls == "SinkBasin" else f"{cls}|{place}")


def _problem(task_type: str, obj: str, target: str, rng: random.Random) -> str:
    """The PDDL problem: a room, its contents, the agent's start and the goal."""
    from alfworld.gen.goal_library import gdict

    (always, optional), names = TASKS[task_type]
    room = always + rng.sample(optional, rng.randint(0, MAX_ROOM - len(always)))
    lamps = [LAMP] if task_type == "look_at_obj_in_light" else []
    contents = [obj] * (2 if task_type == "pick_two_obj_and_place" else 1)
    contents += rng.sample([name for name in names if name != obj], DISTRACTORS) + lamps

    start = _pddl_name("loc|0|-12|0|30")
    receptacles = [
        (_new_id(rng, cls), cls, _pddl_name(f"loc|{i - 3}|{rng.randint(-9, 9)}|{i % 4}|45"))
        for i, cls in enumerate(room)
    ]
    # Nothing that counts for the goal starts in the target.
    homes = {cls: [one for one in receptacles if _starts_in(cls, one[1], obj, target)] for cls in contents}
    objects = [(_new_id(rng, cls), cls, rng.choice(homes[cls])) for cls in contents]
    receptacle_types = sorted(set(room) | DOMAIN_RECEPTACLES)
    object_types = sorted(set(contents) | DOMAIN_OBJECTS)
    facts = [f"atLocation agent1 {start}", *_facts(receptacles, objects)]
    facts += [f"canContain {r}Type {o}Type" for r in receptacle_types for o in object_types if _holds(r, o)]
    declared = ["agent1 - agent"]
    declared += [f"{cls}Type - rtype" for cls in receptacle_types] + [f"{cls}Type - otype" for cls in object_types]
    declared += [f"{name} - object" for name, *_ in objects] + [f"{name} - receptacle" for name, *_ in receptacles]
    declared += [f"{location} - location" for location in [start] + [location for *_, location in receptacles]]
    goal = gdict[task_type]["pddl"].format(obj=obj, recep=target, toggle=LAMP).replace("#", "-").strip()
    lines = ["(define (problem plan_small)", "    (:domain alfred)", "    (:objects"]
    lines += [f"        {item}" for item in declared] + ["    )", "    (:init"]
    lines += [f"        ({fact})" for fact in facts] + ["    )", f"    {goal}"]  # the goal text closes (define too
    return "\n".join(lines) + "\n"


def _starts_in(cls: str, receptacle: str, obj: str, target: str) -> bool:
    if cls == LAMP:
        return receptacle in ("Desk", "SideTable")
    return _holds(receptacle, cls) and not (cls == obj and receptacle == target)


def _facts(receptacles: list[tuple], objects: list[tuple]) -> Iterator[str]:
    """What holds at the start: (id, type, location) of the receptacles, (id, type, receptacle) of the objects."""
    import alfworld.gen.constants as constants

    for name, cls, location in receptacles:
        yield from (f"receptacleType {name} {cls}Type", f"receptacleAtLocation {name} {location}")
        if cls in constants.OPENABLE_CLASS_SET:
            yield f"openable {name}"
    for name, cls, (home, _, location) in objects:
        yield from (f"objectType {name} {cls}Type", f"inReceptacle {name} {home}", f"wasInReceptacle {name} {home}")
        yield f"objectAtLocation {name} {location}"
        for ability in ("Cleanable", "Heatable", "Coolable", "Toggleable", "Sliceable"):
            if cls in constants.VAL_ACTION_OBJECTS[ability]:
                yield f"{ability.lower()} {name}"
        if cls != LAMP:
            yield f"pickupable {name}"


@functools.cache
def _planner_environment() -> Any:
    """One engine per process: every new one keeps its own 33 MB copy of the planner library mapped."""
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld.envs import PddlEnv

    speed_up_textworld()
    return AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))


def _walkthrough(game: dict) -> list[str]:
    """The planner's commands, played to the end. Raises ValueError when they do not win."""
    environment = _planner_environment()
    environment.load(game)
    state = environment.reset()
    planner = environment.unwrapped
    commands = []
    for planned in planner._pddl_state.replan(planner._entity_infos):
        # The planner's spelling has stray double spaces; the engine wants its own.
        command = next((c for c in state["admissible_commands"] if c.split() == planned.split()), planned)
        state, _, _ = environment.step(command)
        commands.append(" ".join(command.split()))
    if not state["won"]:
        raise ValueError(f"the planner's commands do not win: {commands}")
    return commands


def _task_description(grammar: str) -> str:
    """The goal sentence in a grammar made by add_task_to_grammar."""
    text = grammar.rsplit("Your task is to:", 1)[1]
    return text.splitlines()[0].strip(' ";')


def make_game(data_root: str | Path, split: str, task_type: str, variant: int, seed: int) -> dict:
    """Write one game below `data_root` unless it exists; return its dataset row.

    `variant` picks the goal out of `goals(task_type)` (modulo their number), `seed` the room and what lies where.
    """
    obj, target = goals(task_type)[variant % len(goals(task_type))]
    place = f"{task_type}-{obj}-None-{target or LAMP}-{variant}/trial_T{seed:09d}"
    folder = Path(data_root) / DATA_VERSION / split / place
    game_file = folder / "game.tw-pddl"
    if not game_file.exists():
        _write_game(folder, task_type, obj, target, f"{task_type}/{variant}/{seed}")
    game = json.loads(game_file.read_text())
    return {
        "prompt": _task_description(game["grammar"]),
        "label": task_type,
        "metadata": {
            "game_file": str(game_file.relative_to(data_root)),
            "task_type": task_type,
            "demo": {"actions": game["walkthrough"]},
        },
    }


def _write_game(folder: Path, task_type: str, obj: str, target: str, key: str) -> None:
    from alfworld.agents.utils.misc import add_task_to_grammar
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    problem = _problem(task_type, obj, target, random.Random(key))
    toggle = LAMP if task_type == "look_at_obj_in_light" else ""
    parameters = {"object_target": obj, "parent_target": target, "toggle_target": toggle}
    parameters |= {"mrecep_target": "", "object_sliced": False}
    trajectory = {
        "task_id": folder.name,
        "task_type": task_type,
        "scene": {"floor_plan": "FloorPlan0", "scene_num": 0},
        "pddl_params": parameters,
        "turk_annotations": {"anns": []},
        "plan": {"high_pddl": [], "low_actions": []},
    }
    before = random.getstate()
    random.seed(key)  # add_task_to_grammar words the goal with the global generator
    grammar = add_task_to_grammar(Path(ALFRED_TWL2_PATH).read_text(), trajectory)
    random.setstate(before)
    game = {"pddl_domain": Path(ALFRED_PDDL_PATH).read_text(), "grammar": grammar, "pddl_problem": problem}
    game |= {"walkthrough": _walkthrough(game), "solvable": True}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "traj_data.json").write_text(json.dumps(trajectory, indent=1))
    (folder / "initial_state.pddl").write_text(problem)
    # The game file comes last and whole: an interrupted run leaves no half-made game behind.
    partial = folder / f"game.{os.getpid()}.partial"
    partial.write_text(json.dumps(game))
    partial.replace(folder / "game.tw-pddl")


def _make_game(arguments: tuple) -> dict:
    return make_game(*arguments)


def make_games(
    data_root: str | Path,
    train: int,
    heldout: int,
    task_types: Sequence[str] = (SIMPLE,),
    processes: int | None = None,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Write `train` training and `heldout` held-out games with train.jsonl and heldout.jsonl below `data_root`.

    Task types and their goals take turns; the seeds of the two sets are disjoint. `progress` is called once per game.
    """
    sets = {"train": ("train", 0, train), "heldout": ("valid_seen", HELDOUT_SEED, heldout)}
    if train > HELDOUT_SEED:
        raise ValueError(f"at most {HELDOUT_SEED} training games, where the seeds of the held-out games begin")
    Path(data_root).mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for name, (split, first_seed, count) in sets.items():
            jobs = [
                (data_root, split, task_types[i % len(task_types)], i // len(task_types), first_seed + i)
                for i in range(count)
            ]
            rows = []
            for row in pool.imap(_make_game, jobs):
                rows.append(json.dumps(row) + "\n")
                progress()
            (Path(data_root) / f"{name}.jsonl").write_text("".join(rows))
