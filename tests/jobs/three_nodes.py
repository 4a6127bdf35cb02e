"""Keep an emulated cluster of three nodes up until standard input closes."""

from __future__ import annotations

import atexit
import shutil
import socket
import sys
import tempfile
from contextlib import ExitStack

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 150_000_000}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on: the nodes of one machine cannot share Ray's default ones."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    head, *others = ({**NODE, "dashboard_agent_listen_port": port} for port in free_ports(3))
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**head, "include_dashboard": True, "dashboard_port": 0},
    )
    for node in others:
        # A folder of its own: nodes that share one delete each other's copy of a job's code.
        folder = tempfile.mkdtemp(prefix="ray-node-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        cluster.add_node(**node, temp_dir=folder)
    cluster.wait_for_nodes()
    print(f"dashboard http://{cluster.head_node.webui_url} {cluster.address}", flush=True)
    sys.stdin.read()
    cluster.shutdown()
