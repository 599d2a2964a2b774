"""A cluster without a worker: Ray's own autoscaler makes it grow with a search, and empties it afterwards."""

import json
import time
from pathlib import Path

import pytest
from local_cluster import Cluster, census, free_port, wait_for
from watched_search import Search, environment

HEAD = "f" * 51 + "00000"
"""What the provider below calls the head, and what the head must call itself, or it counts as a node too many."""


def zero_to_two(port: int) -> dict[str, object]:
    """As `cluster/aws.yaml`, with nodes that are processes of this machine.

    Ray's class for it, `ray.cluster_utils.AutoscalingCluster`, would stop every Ray of the machine first. It and the
    provider's short name, `fake_multinode`, need a file that is not in Ray's wheel; an external provider needs none,
    but every field below.
    """
    provider = {
        "type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": f"127.0.0.1:{port}", "head_node_id": HEAD, "launch_multiple": True,
        "disable_node_updaters": True, "disable_launch_config_check": True,
    }  # fmt: skip
    types = {
        "ray.head.default": {"resources": {"CPU": 0, "dskd_driver": 1}, "node_config": {}, "max_workers": 0},
        "trials": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    commands = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    return {
        **{name: [] for name in (*commands, "head_start_ray_commands", "worker_start_ray_commands")},
        "cluster_name": "zero", "max_workers": 2, "idle_timeout_minutes": 0.1, "provider": provider,
        "available_node_types": types, "head_node_type": "ray.head.default",
        "cluster_synced_files": [], "file_mounts": {}, "file_mounts_sync_continuously": False, "auth": {},
    }  # fmt: skip


@pytest.mark.cluster
def test_trials_of_two_workers_make_a_cluster_grow_from_zero_nodes_and_leave_it_at_zero(
    mvtec_root: Path, cluster_folder: Path
) -> None:
    port = free_port()
    (cluster_folder / "autoscaling.json").write_text(json.dumps(zero_to_two(port)))
    env = environment(cluster_folder)
    # The second autoscaler, as with `ray up` and KubeRay; `ray start` alone takes the first.
    of_autoscaler = {
        "RAY_FAKE_CLUSTER": "1", "RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }  # fmt: skip
    offered = ['--resources={"dskd_driver": 1}', f"--autoscaling-config={cluster_folder / 'autoscaling.json'}"]
    made = Cluster(cluster_folder, env | of_autoscaler, offered, port)
    try:
        (head,) = census(made)["alive"]
        assert "CPU" not in head["Resources"], "no trial finds a place yet"
        (home,) = made.raylets()
        words = [
            "--data", str(mvtec_root), "--categories", "tile", "--address", made.address, "--trials", "3",
            "--epochs", "2", "--max-concurrent", "2", "--workers-per-trial", "2", "--storage", env["DSKD_STORAGE"],
            "--teacher-weights", "random", "--image-size", "32", "--batch-size", "4", "--preset", "stfpm", "--json",
            "--folds", "0",
        ]  # fmt: skip
        search = Search("grows", words, env, cluster_folder).start()
        nodes, computed_on, waited_on = set(), set(), set()
        try:
            while not search.has_ended:
                nodes |= made.raylets() - {home}
                computed_on |= {each.parent for each in made.find("worker")}
                waited_on |= {
                    each.parent for kind in ("study", "relay", "controller", "dispatcher") for each in made.find(kind)
                }
                time.sleep(0.2)
            outcome = search.outcome(1)
        finally:
            search.end()
        assert outcome["num_trials"] == 3 and outcome["num_failed"] == 0 and outcome["champion"], outcome
        assert len(computed_on) >= 2 and computed_on <= nodes, "a trial's workers lie on nodes that came for them"
        assert waited_on == {home}, "what only waits keeps no node from going"
        wait_for(lambda: made.raylets() == {home}, "an empty cluster", 120)
        left = census(made)
        assert left["nodes"] == 1 and not left["held"] and not left["groups"], left
    finally:
        made.stop()
