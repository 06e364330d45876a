"""Sick, cut-off and spare nodes; a controller that goes away; more than one rank per node."""

import time
from pathlib import Path

import numpy as np

from tests.slurm.test_jobs import OTHER_LAYOUT
from tests.support.slurm_cluster import SlurmCluster
from tests.support.slurm_jobs import Job, Jobs, own_cluster

THREE = ("node1", "node2", "node3")


def make_sick(cluster: SlurmCluster, node: str, run_dir: Path) -> None:
    """The run folder cannot be written there: what a broken mount does."""
    folder = run_dir / "slurm"
    folder.mkdir(parents=True)
    cluster.on_node(node, ["mount", "--bind", folder, folder])
    cluster.on_node(node, ["mount", "-o", "remount,bind,ro", folder])


def nodes_of(job: Job) -> list[list[str]]:
    """Nodes of each attempt."""
    return [event["nodes"] for event in job.journal("attempt")]


def test_sick_node_is_named_and_left_out(
    demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    with own_cluster(nodes=THREE) as cluster:
        jobs = Jobs(cluster, demo_data, tmp_path)
        make_sick(cluster, "node2", tmp_path / "excluding")
        job = jobs.launch("excluding")
        job.finish()
        assert job.losses() == expected
        [sick] = job.journal("sick")
        assert sick["message"].startswith("node2: ")
        assert "Read-only file system" in sick["message"]
        assert [life["job"] for life in job.journal("life")] == ["1", "2"]
        assert nodes_of(job) == [["node1", "node3"]]


def test_spare_node_takes_the_place_of_a_sick_one(
    demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    with own_cluster(nodes=THREE) as cluster:
        make_sick(cluster, "node2", tmp_path / "sparing")
        job = Jobs(cluster, demo_data, tmp_path).launch("sparing", options=("--spare-nodes", "1"))
        job.finish()
        assert job.losses() == expected
        assert len(job.journal("life")) == 1
        assert nodes_of(job) == [["node1", "node3"]]


def test_node_whose_network_fails_is_told_from_those_it_fails_with(
    demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    """Every node's part of the all-reduce fails; only one has no interface of the right name."""
    with own_cluster(nodes=THREE) as cluster:
        ip = ["ip", "link", "set", "eth0"]
        for change in (["down"], ["name", "eth9"]):
            cluster.on_node("node2", [*ip, *change])
        cluster.on_node("node2", ["ip", "link", "set", "eth9", "up"])
        job = Jobs(cluster, demo_data, tmp_path).launch(
            "unheard", options=("--spare-nodes", "1"), network_interface="eth0"
        )
        job.finish(120)
        assert job.losses() == expected
        [sick] = job.journal("sick")
        assert sick["message"].startswith("node2: no all-reduce with another node works (")
        assert nodes_of(job) == [["node1", "node3"]]
        assert len(job.journal("life")) == 1


def test_all_nodes_sick_is_no_nodes_fault(
    demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    """As where a library lacks on all of them: none is left out. Here no GPU computes, and the run
    needs none."""
    with own_cluster(gpus_per_node=1) as cluster:
        job = Jobs(cluster, demo_data, tmp_path).launch("all-sick", device="gpu")
        job.finish()
        assert job.losses() == expected
        messages = [event["message"] for event in job.journal("sick")]
        assert messages == [f"{node}: 0 of 1 devices are seen" for node in ("node1", "node2")]
        assert [event["message"] for event in job.journal("note")] == [
            "more than half of the nodes: none is left out"
        ]
        assert nodes_of(job) == [["node1", "node2"]]
        assert not job.journal("unfit")


def test_node_that_is_cut_off_and_comes_back(
    demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    """Its rank lives on behind the cut, and must neither write nor stay."""
    with own_cluster() as cluster:
        job = Jobs(cluster, demo_data, tmp_path).launch("cut-off")
        job.reach(12)
        cluster.link_down("node2")
        job.wait(lambda: len(job.journal("attempt")) == 2, "an attempt without node2")
        cluster.link_up("node2")
        job.finish()
        np.testing.assert_allclose(job.losses(), expected, rtol=OTHER_LAYOUT)
        assert nodes_of(job) == [["node1", "node2"], ["node1"]]
        assert len(job.journal("life")) == 1
        cluster.wait_until(lambda: not cluster.processes("node2") or None, 60, "no orphans")


def test_controller_that_is_away_for_a_while(
    demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    with own_cluster() as cluster:
        job = Jobs(cluster, demo_data, tmp_path).launch("uncontrolled")
        job.reach(5)
        cluster.stop_controller()
        time.sleep(3)
        cluster.start_controller()
        job.finish()
        assert job.losses() == expected
        assert len(job.journal("attempt")) == 1
        job.wait(lambda: job.slurm_state() == "COMPLETED", "COMPLETED")


def test_two_ranks_on_each_of_two_nodes(
    demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    with own_cluster() as cluster:
        job = Jobs(cluster, demo_data, tmp_path).launch(
            "grid", "parallel.tensor=2", devices_per_node=2
        )
        job.finish(180)
        np.testing.assert_allclose(job.losses(), expected, rtol=OTHER_LAYOUT)
        said = cluster.run(["cat", job.run_dir / "logs" / "rank_3.log"]).stdout
        assert "rank 3 of 4 on node2" in said
