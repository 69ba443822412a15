"""Whether a Ray cluster that is up (RAY_ADDRESS) can run what the script starts: GPUs, engines, environment.

slime takes the GPUs node by node in the order of the nodes' addresses: training has the first ones, the engines those
behind. It finds an engine's node by counting: each node but the last has --num-gpus-per-node of the engines' GPUs.
"""

import itertools
import os
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from .. import ConfigError
from ..environments.protocol import load_environment
from ..episode.rows import Row, task_of
from ..settings.config import TcodConfig

PROBE_S = 300.0  # of an engine on every node: the first import of an environment takes its time there
GPU_IDS_S = 20.0  # They are free before a run, or slime waits for them.


@dataclass(frozen=True)
class Node:
    id: str
    address: str
    gpus: int
    is_here: bool


def check_cluster(options: Namespace, config: TcodConfig, row: Row) -> None:
    """Raises ConfigError, with what to change."""
    nodes = connect(os.environ["RAY_ADDRESS"])
    found = sum(node.gpus for node in nodes)
    if found < options.ray_gpus:
        raise ConfigError(
            f"the Ray cluster has {found} GPUs, less than the {options.ray_gpus} that training and rollouts take: "
            "change ACTOR_NODES, ACTOR_GPUS or ROLLOUT_GPUS, or add nodes"
        )
    if found == options.ray_gpus:  # else slime chooses among them
        check_engines([node.gpus for node in nodes], options)
    for node in nodes:
        ids = gpu_ids(node) if node.gpus else []
        if uuids := [name for name in ids if not name.isdecimal()]:
            raise ConfigError(
                f"Ray on {node.address} has the GPU {uuids[0]}, and slime wants indices: "
                "set CUDA_VISIBLE_DEVICES to those, as 0,1,2, where Ray is started"
            )
        taken = [name for name in options.teacher_gpus.split(",") if name in ids]
        if node.is_here and taken:
            raise ConfigError(
                f"Ray on this node owns GPU {taken[0]}, which TEACHER_GPUS gives to the teacher: start Ray here "
                f"without the teacher's GPUs, as CUDA_VISIBLE_DEVICES={','.join(sorted({*ids} - {*taken}))} ray start"
            )
    probe_environment(nodes, config, row)


def connect(address: str) -> list[Node]:
    """The nodes that are alive, in slime's order. Raises ConfigError."""
    import ray

    try:
        ray.init(address=address, logging_level="error", log_to_driver=False)
    except Exception as error:
        raise ConfigError(f"no Ray answers at RAY_ADDRESS {address} ({error}): start it, or unset it") from error
    here = ray.util.get_node_ip_address()
    alive = [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            int(node["Resources"].get("GPU", 0)),
            node["NodeManagerAddress"] == here,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(alive, key=lambda node: [int(part) if part.isdecimal() else 0 for part in node.address.split(".")])


def check_engines(gpus: list[int], options: Namespace) -> None:
    """Whether slime finds the nodes of the engines. `gpus`: of each node, in slime's order."""
    nodes = list(itertools.chain.from_iterable([node] * count for node, count in enumerate(gpus)))
    engines = nodes[options.actor_gpus : options.ray_gpus]
    size, per_node = options.engine_gpus, options.node_gpus
    if size <= per_node:
        for first in range(0, len(engines), size):
            if len(set(engines[first : first + size])) > 1:
                raise ConfigError(
                    f"an engine of ENGINE_GPUS {size} would lie on two nodes: the nodes have {gpus} GPUs, in slime's "
                    f"order, and training takes the first {options.actor_gpus}: change ACTOR_GPUS or ENGINE_GPUS"
                )
    shares = [len(list(group)) for _, group in itertools.groupby(engines)]
    counted = [per_node] * (len(engines) // per_node) + [len(engines) % per_node] * (len(engines) % per_node > 0)
    if shares != counted and not (len(shares) == 1 and len(engines) <= per_node):
        fits = len(set(shares[:-1])) <= 1 and shares[-1] <= shares[0]
        change = f"set NODE_GPUS={shares[0]}" if fits else "change ACTOR_GPUS or ROLLOUT_GPUS so that all have as many"
        raise ConfigError(
            f"the engines' GPUs lie {', '.join(map(str, shares))} to a node, and slime looks for them "
            f"{', '.join(map(str, counted))}: {change}"
        )


def gpu_ids(node: Node) -> list[str]:
    """Ray's names of a node's GPUs; none where another job holds some of them."""
    import ray

    @ray.remote(num_cpus=0, num_gpus=node.gpus)
    def names() -> list[str]:
        return [str(name) for name in ray.get_gpu_ids()]

    [asked] = start_on([node], names)
    done, _ = ray.wait([asked], timeout=GPU_IDS_S)
    if not done:
        ray.cancel(asked, force=True)
        return []
    return ray.get(asked)


def probe_environment(nodes: list[Node], config: TcodConfig, row: Row) -> None:
    """Reset one game on every node: Ray may place an environment's worker on any of them. Raises ConfigError."""
    import ray

    @ray.remote(num_cpus=0)
    def reset() -> str:
        try:
            engine = load_environment(config.tcod_environment)(config.tcod_data_root, **config.tcod_env_args)
            engine.reset(task_of(row.metadata))
            engine.close()
        except BaseException as error:  # whatever an engine may raise
            return repr(error)
        return ""

    asked = start_on(nodes, reset)
    done, _ = ray.wait(asked, num_returns=len(asked), timeout=PROBE_S)
    for node, reply in zip(nodes, asked, strict=True):
        try:
            said = ray.get(reply) if reply in done else f"no answer after {PROBE_S:.0f} s"
        except ray.exceptions.RayError as error:
            said = str(error).strip().splitlines()[-1]
        if said:
            raise ConfigError(
                f"{config.tcod_environment} does not run on the node {node.address} ({said}): install it there, put "
                "the data on storage that every node sees, and name the variables that it needs in WORKER_ENV"
            )


def start_on(nodes: list[Node], task: Any) -> list[Any]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = (NodeAffinitySchedulingStrategy(node.id, soft=False) for node in nodes)
    return [task.options(scheduling_strategy=strategy, max_retries=0).remote() for strategy in there]
