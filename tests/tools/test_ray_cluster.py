"""The run script's checks of a Ray cluster that is up: where slime will look for engines, whose GPUs are whose."""

import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest
import ray

from examples.tcod import ConfigError
from examples.tcod.tools import ray_cluster

NUM_GPUS = 0


@pytest.mark.parametrize(
    "nodes, actor, rollout, engine, node_gpus, sentence",
    [
        ([8], 4, 4, 1, 8, None),
        ([4, 8], 8, 4, 1, 8, None),  # all engines on the second node
        ([8, 8], 4, 12, 1, 8, "GPUs lie 4, 8 to a node, and slime looks for them 8, 4: change ACTOR_GPUS or ROLLOUT"),
        ([8, 8], 8, 8, 2, 8, None),
        ([8, 4], 4, 8, 1, 8, "lie 4, 4 to a node, and slime looks for them 8: set NODE_GPUS=4"),
        ([8, 4], 4, 8, 1, 4, None),
        ([8, 8, 8], 8, 16, 4, 8, None),
        ([6, 6], 0, 12, 4, 8, "an engine of ENGINE_GPUS 4 would lie on two nodes: the nodes have [6, 6] GPUs"),
        ([6, 6], 0, 12, 2, 8, "lie 6, 6 to a node, and slime looks for them 8, 4: set NODE_GPUS=6"),
        ([6, 6], 0, 12, 2, 6, None),
        ([8, 8, 8], 8, 16, 16, 8, None),  # an engine of two whole nodes
    ],
)
def test_slime_finds_the_nodes_of_the_engines(nodes, actor, rollout, engine, node_gpus, sentence):
    """It counts --num-gpus-per-node of the engines' GPUs to each node, and asks the first engine for its address."""
    options = Namespace(actor_gpus=actor, ray_gpus=actor + rollout, engine_gpus=engine, node_gpus=node_gpus)
    if sentence is None:
        ray_cluster.check_engines(nodes, options)
    else:
        with pytest.raises(ConfigError) as error:
            ray_cluster.check_engines(nodes, options)
        assert sentence in str(error.value)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """preflight(*flags) -> (exit status, what it says), with a Ray of four GPUs up."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    ray.shutdown()  # that of other modules
    context = ray.init(address="local", num_cpus=1, num_gpus=4, include_dashboard=False, log_to_driver=False)
    row = {"prompt": "walk", "label": "walk", "metadata": {"goal": 2}}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    config = "tcod_variant: opd\ntcod_horizon: 4\ntcod_data_root: /tmp\ntcod_environment: "
    (tmp_path / "here.yaml").write_text(config + "tests.support.toys.Corridor\n")
    (tmp_path / "there.yaml").write_text(config + "tests.support.toys.Elsewhere\n")

    def preflight(checkpoint, *flags, config="here", **variables):
        command = [sys.executable, "-m", "examples.tcod.tools.preflight", "run", "--student", checkpoint]
        command += ["--config", tmp_path / f"{config}.yaml", "--train", tmp_path / "train.jsonl", "--ray-gpus", "4"]
        env = {**os.environ, "RAY_ADDRESS": context.address_info["gcs_address"], **variables}
        done = subprocess.run([*command, *flags], env=env, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stderr.strip().splitlines()[-1:]

    yield preflight
    ray.shutdown()


def test_a_ray_cluster_is_looked_at_before_a_gpu_is_taken(cluster, checkpoint):
    assert cluster(checkpoint, "--actor-gpus", "2", "--teacher-gpus", "4,5")[0] == 0
    status, [said] = cluster(checkpoint, "--teacher-gpus", "3,4")
    assert status == 1 and said.startswith("preflight: Ray on this node owns GPU 3, which TEACHER_GPUS gives to the")
    assert "CUDA_VISIBLE_DEVICES=0,1,2 ray start" in said
    status, [said] = cluster(checkpoint, "--ray-gpus", "8")
    assert status == 1 and "the Ray cluster has 4 GPUs, less than the 8 that training and rollouts take" in said
    status, [said] = cluster(checkpoint, config="there")
    assert status == 1 and "tests.support.toys.Elsewhere does not run on the node " in said
    assert "ModuleNotFoundError" in said and "install it there" in said


def test_engines_are_looked_for_in_the_whole_cluster(monkeypatch):
    nodes = [ray_cluster.Node("id", f"10.0.0.{i}", 8, False) for i in (1, 2)]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray_cluster, "connect", lambda address: nodes)
    options = Namespace(ray_gpus=16, actor_gpus=4, engine_gpus=1, node_gpus=8, teacher_gpus="")
    with pytest.raises(ConfigError, match="the engines' GPUs lie 4, 8 to a node, and slime looks for them 8, 4"):
        ray_cluster.check_cluster(options, None, {})


def test_nodes_come_in_slimes_order(monkeypatch):
    """By the numbers of the address, not by its letters; a dead one does not count."""
    seen = [("10.0.0.10", 8, True), ("10.0.0.9", 4, True), ("10.0.0.8", 8, False)]
    nodes = [
        {"NodeID": address, "NodeManagerAddress": address, "Resources": {"GPU": float(gpus)}, "Alive": alive}
        for address, gpus, alive in seen
    ]
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.10")
    found = [(node.address, node.gpus, node.is_here) for node in ray_cluster.connect("10.0.0.9:6379")]
    assert found == [("10.0.0.9", 4, False), ("10.0.0.10", 8, True)]


def test_a_ray_cluster_that_does_not_answer_is_named(monkeypatch):
    def nobody(address, **_):
        raise ConnectionError("refused")

    monkeypatch.setattr(ray, "init", nobody)
    with pytest.raises(ConfigError, match="no Ray answers at RAY_ADDRESS 10.0.0.1:6379 .refused.: start it"):
        ray_cluster.connect("10.0.0.1:6379")


def test_gpus_of_a_ray_cluster_that_go_by_uuids_are_refused(monkeypatch):
    node = ray_cluster.Node("id", "10.0.0.1", 2, False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray_cluster, "connect", lambda address: [node])
    monkeypatch.setattr(ray_cluster, "gpu_ids", lambda node: ["GPU-1", "GPU-2"])
    options = Namespace(ray_gpus=2, actor_gpus=1, engine_gpus=1, node_gpus=8, teacher_gpus="")
    with pytest.raises(ConfigError, match="Ray on 10.0.0.1 has the GPU GPU-1, and slime wants indices: set CUDA_VIS"):
        ray_cluster.check_cluster(options, None, {})
