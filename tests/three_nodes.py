"""A Ray cluster of three nodes on this machine, in a network where nothing else is.

Ray listens on every interface and takes jobs from whoever reaches it, so it is started in a network
of its own that has the loopback interface alone. Making one takes root.
"""

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1
ray: Any = pytest.importorskip("ray")


@contextmanager
def loopback_only() -> Iterator[None]:
    """While this lasts, this thread and what it starts see a network of their own."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as outside:
        if libc.unshare(CLONE_NEWNET):
            pytest.skip(f"no network of its own for Ray: {os.strerror(ctypes.get_errno())}")
        try:
            with socket.socket() as any_socket:
                up = struct.pack("16sh22x", b"lo", IFF_UP)
                fcntl.ioctl(any_socket, SIOCSIFFLAGS, up)
            yield
        finally:
            libc.setns(outside.fileno(), CLONE_NEWNET)


@contextmanager
def three_nodes() -> Iterator[Any]:
    """Nodes of one core each; gives Ray's own `Cluster`, to add nodes to and remove them from."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with loopback_only():
        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
