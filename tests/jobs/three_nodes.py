"""Keep an emulated cluster of three nodes up until standard input closes."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 150_000_000}

if __name__ == "__main__":
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**NODE, "include_dashboard": True, "dashboard_port": 0},
    )
    for _ in range(2):
        cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    print(f"dashboard http://{cluster.head_node.webui_url}", flush=True)
    sys.stdin.read()
    cluster.shutdown()
