"""Whether the nodes can talk to each other, found out before a collective would wait for it in vain.

That the rendezvous came about says little: it is one port of one node. NCCL and gloo open ports of their own on every
node, on the interface they were given, and where a firewall drops connections there they wait.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.platform import nics
from megatron_rocm.platform.network import PORTS, socket_interface
from megatron_rocm.platform.route import KNOCK, knock, way_to

PEERS = 8  # nodes that each one tries: all of a small run; of a large one the next ones
SLOWEST = 60.0  # seconds that a first collective may take where RDZV_TIMEOUT is less
LAST_WORDS = 1.0  # seconds for the message to be read before the process ends
HEARD = datetime.timedelta(seconds=10)  # for the others to read what was said, before the store ends with node 0


def meet(store: dist.Store, run: RunConfig, rank: int) -> None:
    """Connect to other nodes as NCCL and gloo will. Every process calls it; the first of each node does it.

    Raises UsageError on all of them where one node could not, with its interface, the address and the port it tried.
    The messages differ from node to node, so that each node's log has one.
    """
    nodes, (node, local) = run.parallel.nnodes, divmod(rank, run.parallel.gpus_per_node)
    if nodes == 1:
        return
    said = [f"meeting/said/{other}" for other in range(nodes)]
    patience = datetime.timedelta(seconds=run.launch.rdzv_timeout + KNOCK)
    try:
        with contextlib.ExitStack() as open_doors:
            if local == 0:
                name, address = interface(run)
                door = open_doors.enter_context(_listening(address))
                store.set(f"meeting/door/{node}", f"{name} {address} {door.getsockname()[1]}")
                others = ((node + step) % nodes for step in range(1, min(PEERS, nodes - 1) + 1))
                complaint = next(filter(None, (_tried(store, other, patience) for other in others)), "")
                store.set(said[node], f"node {node}, {name} ({address}), to {complaint}" if complaint else "")
            store.wait(said, patience)
            complaints = [told.decode() for told in store.multi_get(said) if told]
    except dist.DistError as error:
        silent = _silent(store, nodes)
        if node == 0:  # where the store is, which the others ask the same now
            time.sleep(LAST_WORDS)
        raise UsageError(f"node {node}: {silent}; see that node's log") from error
    if not complaints:
        return
    heard = [f"meeting/heard/{other}" for other in range(run.parallel.world_size)]
    with contextlib.suppress(dist.DistError):
        store.set(heard[rank], "")
        store.wait(heard, HEARD)
    raise UsageError(
        "\n  ".join([f"node {node}: the nodes can't reach each other:", *complaints])
        + "\n  NCCL and gloo connect all nodes, on ports that the kernel gives out: let TCP through between them "
        "on these interfaces, or name another one with NETWORK_INTERFACE"
    )


@contextlib.contextmanager
def deadline(seconds: float, run: RunConfig, rank: int) -> Iterator[None]:
    """End with status 2 and a message where the first collective hangs, be it inside C++, or fails between nodes."""
    node, local = divmod(rank, run.parallel.gpus_per_node)
    over = ""
    if run.parallel.nnodes > 1:
        name, address = interface(run)
        rdma = f" and RDMA ports {os.environ[PORTS]}" if PORTS in os.environ else ""
        master = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
        over = f", over {name} ({address}){rdma}; the master is {master}"
    what = f"node {node}: the first collective did not come about"
    look = "NCCL_DEBUG=INFO says what NCCL waits for, docs/network.md what to try"
    text = f"error: {what} within {seconds:g} seconds{over}. {look}\n"

    def end() -> None:
        if local == 0:
            os.write(2, text.encode())
        time.sleep(LAST_WORDS)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:  # torch's DistError, and what gloo throws
        if run.parallel.nnodes == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split("\nException raised")[0].split())
        raise UsageError(f"{what}{over} ({reason}). {look}") from error
    finally:
        timer.cancel()


def interface(run: RunConfig) -> tuple[str, str]:
    """The interface this process offers its sockets on, and its address there."""
    if found := socket_interface(os.environ, nics.interfaces(), run.hardware.vendor):
        return found
    way = way_to(os.environ["MASTER_ADDR"])
    return way.interface, way.source


def _listening(address: str) -> socket.socket:
    """A socket that the kernel lets connections in on; nobody takes them up."""
    return socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET, backlog=128)


def _tried(store: dist.Store, other: int, patience: datetime.timedelta) -> str:
    """ "" where the other node's door opens, or else what was tried and what came of it."""
    key = f"meeting/door/{other}"
    store.wait([key], patience)
    name, address, port = store.get(key).decode().split(" ")
    reason = knock(address, int(port))
    return f"node {other}, {name} ({address}) port {port}: {reason}" if reason else ""


def _silent(store: dist.Store, nodes: int) -> str:
    """Which nodes have no door or, where all have one, did not say what they tried."""
    for what in ("door", "said"):
        try:
            missing = [str(node) for node in range(nodes) if not store.check([f"meeting/{what}/{node}"])]
        except dist.DistError:
            break
        if missing:
            return f"node {', '.join(missing)} went away before the nodes had tried to reach each other"
    return f"node 0 at {os.environ['MASTER_ADDR']} went away before the nodes had tried to reach each other"
