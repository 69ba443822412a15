"""Ray for the tools, and the run script's checks of a cluster that is up: where slime will look for engines, whose
GPUs are whose."""

import errno
import re
import socket

import pytest
import ray

from examples.tcod import ConfigError
from examples.tcod.episode.rows import Row
from examples.tcod.settings.config import TcodConfig
from examples.tcod.tools.common.ray_start import start_ray
from examples.tcod.tools.launch import ray_cluster

NUM_GPUS = 0


@pytest.mark.parametrize(
    "nodes, first, size, per_node, sentence",
    [
        ([8], 4, 1, 8, None),
        ([4, 8], 8, 1, 8, None),  # all engines on the second node
        ([8, 8], 4, 1, 8, r"have \[4, 8\] .* looks for 8 on each node except the last: change ACTOR_GPUS or ROLL"),
        ([8, 8], 8, 2, 8, None),
        ([8, 4], 4, 1, 8, r"have \[4, 4\] .* looks for 8 on each node except the last: set NODE_GPUS=4"),
        ([8, 4], 4, 1, 4, None),
        ([8, 8, 8], 8, 4, 8, None),
        ([6, 6], 0, 4, 8, r"have \[6, 6\] .* and an engine of ENGINE_GPUS 4 would lie on two"),
        ([6, 6], 0, 2, 8, r"have \[6, 6\] .*: set NODE_GPUS=6"),
        ([6, 6], 0, 2, 6, None),
        ([8, 8, 8], 8, 16, 8, None),  # an engine of two whole nodes
    ],
)
def test_slime_finds_the_nodes_of_the_engines(nodes, first, size, per_node, sentence):
    """It counts --num-gpus-per-node of the engines' GPUs to each node, and asks the first engine for its address."""
    each = [f"node {i}" for i, count in enumerate(nodes) for _ in range(count)]
    if sentence is None:
        ray_cluster.check_engines(each[first:], size, per_node)
    else:
        with pytest.raises(ConfigError, match=sentence):
            ray_cluster.check_engines(each[first:], size, per_node)


@pytest.fixture
def cluster(monkeypatch, settings, without_ray):
    """check(environment, teacher's GPUs, **variables) -> the nodes, or the refusal; with a Ray of four GPUs up."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    address = ray.init(address="local", num_cpus=1, num_gpus=4, include_dashboard=False).address_info["gcs_address"]

    def check(environment="Corridor", teacher_gpus="", **variables):
        config = TcodConfig(tcod_horizon=4, tcod_environment=f"tests.support.toys.{environment}")
        s = settings(RAY_ADDRESS=address, ACTOR_GPUS="2", ROLLOUT_GPUS="2", **variables)
        try:
            return ray_cluster.check_cluster(s, teacher_gpus, [(config, Row("walk", "walk", {"goal": 2}))])
        except ConfigError as error:
            return str(error)

    yield check
    ray.shutdown()


def test_a_ray_cluster_is_looked_at_before_a_gpu_is_taken(cluster):
    assert cluster(teacher_gpus="4,5") == [ray.util.get_node_ip_address()]
    said = cluster(teacher_gpus="3,4")
    assert "Ray on this node owns GPU 3, which TEACHER_GPUS gives to the teacher" in said
    assert "CUDA_VISIBLE_DEVICES=0,1,2 ray start" in said
    said = cluster(ACTOR_NODES="3")
    assert "the Ray cluster has 4 GPUs, less than the 8 of training and rollouts: change ACTOR_NODES" in said
    said = cluster("Elsewhere")
    assert said.startswith("tests.support.toys.Elsewhere does not run on the node ")
    assert "(ModuleNotFoundError: No module named 'corridors'): install it there" in said


def test_engines_are_looked_for_in_slimes_order(settings, monkeypatch):
    """By the numbers of the address, not by its letters; a dead node does not count."""
    seen = [("10.0.0.10", 8, True), ("10.0.0.9", 4, True), ("10.0.0.8", 8, False)]
    nodes = [
        {"NodeID": address, "NodeManagerAddress": address, "Resources": {"GPU": float(gpus)}, "Alive": alive}
        for address, gpus, alive in seen
    ]
    monkeypatch.setattr(ray_cluster, "start_ray", lambda workers: None)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    s = settings(RAY_ADDRESS="10.0.0.9:6379", ACTOR_GPUS="2", ROLLOUT_GPUS="10")
    with pytest.raises(ConfigError, match=r"have \[2, 8\] of the engines' GPUs, and slime looks for 8"):
        ray_cluster.check_cluster(s, "", [])
    s = settings(RAY_ADDRESS="10.0.0.9:6379", ACTOR_GPUS="12", ROLLOUT_GPUS="10", VARIANT="sft")  # has no engines
    assert ray_cluster.check_cluster(s, "", []) == ["10.0.0.9", "10.0.0.10"]


@pytest.fixture
def without_ray():
    """Other tests of this process may have started it."""
    ray.shutdown()


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "[::1]:{}"])
def test_a_ray_cluster_that_is_gone_is_named_at_once(monkeypatch, without_ray, address):
    monkeypatch.setattr(ray, "init", None)  # it would ask for minutes
    monkeypatch.setenv("RAY_ADDRESS", address.format(closed_port()))
    with pytest.raises(
        ConfigError, match=f"Connection refused.: start it, or unset RAY_ADDRESS {re.escape(address[:6])}"
    ):
        start_ray(workers=1)


def test_a_failure_of_ray_is_told_with_where_to_look(monkeypatch, without_ray):
    def fail(**_):
        raise PermissionError(errno.EACCES, "Permission denied", "/home/x")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ConfigError, match="'/home/x'.: see ray/session_latest/logs in TMPDIR"):
        start_ray(workers=1)
