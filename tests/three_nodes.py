"""A Ray cluster of three nodes on this machine, in an isolated network namespace.

Ray listens on every interface and runs jobs for anyone who can connect, so it is started in a
namespace that has only the loopback interface. Creating one needs root.
"""

import ctypes
import fcntl
import logging
import os
import socket
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec.asyn
import psutil
import pytest

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1
# Read when ray is imported first, here and in every process that is started.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = uuid.uuid4().hex
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # as colorfilter.compute.ray_pool has it
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
            assert libc.setns(outside.fileno(), CLONE_NEWNET) == 0


@contextmanager
def three_nodes() -> Iterator[Any]:
    """Nodes of one core each; gives Ray's own `Cluster`, to add nodes to and remove them from."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(**node)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def workers_at_work() -> list[psutil.Process]:
    """Workers on the nodes that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "_Worker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch, bucket: str) -> Iterator[str]:
    """An S3 server with a bucket; gives the bucket's URI. What it holds lives in memory."""
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    fsspec.asyn.iothread[:] = fsspec.asyn.loop[:] = [None]  # a thread of another network
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # which logs every request
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "secret-of-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    try:
        boto3.client("s3").create_bucket(Bucket=bucket)
        yield f"s3://{bucket}"
    finally:
        server.stop()
        fsspec.asyn.iothread[:] = fsspec.asyn.loop[:] = [None]
