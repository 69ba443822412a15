"""Whether a Ray cluster that is up (RAY_ADDRESS) can run what the script starts: GPUs, engines, environment.

slime takes the GPUs node by node in the order of the nodes' addresses: training has the first ones, the engines the
next ones. It does not ask where an engine is, but counts NODE_GPUS of the engines' GPUs to each node.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ... import ConfigError
from ...environments.protocol import load_environment
from ...episode.rows import Row, task_of
from ...settings.config import TcodConfig
from ..common.ray_start import start_ray
from .variables import Settings, require

PROBE_S = 300.0  # of an environment on every node: the first import of an environment takes its time there
GPU_IDS_S = 20.0  # Ray's GPUs are free before a run, or slime waits for them


def check_cluster(s: Settings, teacher_gpus: str, games: Sequence[tuple[TcodConfig, Row]]) -> list[str]:
    """Returns the addresses of the nodes. Raises ConfigError, with what to change.

    Args:
        games: a row of each environment, with its settings.
    """
    start_ray(workers=1)
    nodes = {node["NodeManagerAddress"]: node for node in ray.nodes() if node["Alive"]}
    order = sorted(nodes, key=lambda address: [int(part) if part.isdecimal() else 0 for part in address.split(".")])
    gpus = {address: int(nodes[address]["Resources"].get("GPU", 0)) for address in order}
    found = f"the Ray cluster has {sum(gpus.values())} GPUs, less than the {s.train_gpus} of training and rollouts"
    enough = sum(gpus.values()) >= s.train_gpus
    require(enough, f"{found}: change ACTOR_NODES, ACTOR_GPUS or ROLLOUT_GPUS, or add nodes")
    if sum(gpus.values()) == s.train_gpus and s.variant != "sft":  # with more, slime chooses among them; sft has none
        each = [address for address, count in gpus.items() for _ in range(count)]
        check_engines(each[s.train_gpus - s.rollout_gpus :], s.engine_gpus, s.node_gpus)
    here = ray.util.get_node_ip_address()
    if teacher_gpus and gpus.get(here):
        check_teacher_gpus(nodes[here]["NodeID"], gpus[here], teacher_gpus.split(","))
    for config, row in games:
        check_environment({address: node["NodeID"] for address, node in nodes.items()}, config, row)
    return order


def check_engines(nodes: list[str], size: int, node_gpus: int) -> None:
    """Whether slime finds the engines; `nodes`: of each of their GPUs, in slime's order. Raises ConfigError."""
    order = list(dict.fromkeys(nodes))
    places, counts = [order.index(node) for node in nodes], [nodes.count(node) for node in order]
    found = f"the nodes have {counts} of the engines' GPUs"
    whole = size > node_gpus or all(len({*places[i : i + size]}) == 1 for i in range(0, len(places), size))
    require(whole, f"{found}, and an engine of ENGINE_GPUS {size} would lie on two: change ACTOR_GPUS or ENGINE_GPUS")
    counted = {size: [i // size for i in range(len(places))] for size in (node_gpus, counts[0])}
    remedy = f"set NODE_GPUS={counts[0]}" if places == counted[counts[0]] else "change ACTOR_GPUS or ROLLOUT_GPUS"
    looks = f"slime looks for {node_gpus} on each node except the last"
    require(places == counted[node_gpus], f"{found}, and {looks}: {remedy}")


def check_teacher_gpus(node: str, count: int, teacher_gpus: list[str]) -> None:
    """Whether the teacher's GPUs are none of Ray's on this node. Raises ConfigError."""
    with suppress(ray.exceptions.GetTimeoutError):  # another job has some of them
        owned = [str(name) for name in ray.get(on(node, ray.get_gpu_ids, count), timeout=GPU_IDS_S)]
        both = [name for name in owned if name in teacher_gpus]
        others = ",".join(sorted(name for name in owned if name not in both))
        remedy = f"start Ray here without the teacher's, as CUDA_VISIBLE_DEVICES={others} ray start"
        require(
            not both, f"Ray on this node owns GPU {','.join(both)}, which TEACHER_GPUS gives to the teacher: {remedy}"
        )


def check_environment(nodes: dict[str, str], config: TcodConfig, row: Row) -> None:
    """Reset one game on every node: Ray may place an environment's worker on any of them. Raises ConfigError."""

    def reset() -> None:
        environment = load_environment(config.tcod_environment)(config.tcod_data_root, **config.tcod_env_args)
        environment.reset(task_of(row.metadata))
        environment.close()

    for address, reply in {address: on(node, reset) for address, node in nodes.items()}.items():
        try:
            ray.get(reply, timeout=PROBE_S)
        except Exception as error:  # whatever an environment may raise
            said = str(error).strip().splitlines()[-1]
            raise ConfigError(
                f"{config.tcod_environment} does not run on the node {address} ({said}): install it there, put the "
                "data on storage that every node sees, and name the variables that it needs in WORKER_ENV"
            ) from error


def on(node: str, task: Callable[[], Any], gpus: int = 0) -> Any:
    """Start a task on a node; returns what `ray.get` takes."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0, scheduling_strategy=there)(task).remote()
