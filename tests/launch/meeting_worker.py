"""`meeting_worker.py MASTER PORT RANK NAME=VALUE …`: a node's first process, as far as the nodes' meeting.

They meet once for each NAME=VALUE, which is in the environment for that time: NCCL's as on a GPU, gloo's as without.
Rank 1 stays away from the meeting of `stays=away`.
"""

import datetime
import os
import sys

import torch.distributed as dist
from support import tiny_run

from megatron_rocm.errors import UsageError
from megatron_rocm.platform.process import die_with_parent
from megatron_rocm.train import meeting

die_with_parent()
os.environ["MASTER_ADDR"], port, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = dist.TCPStore(os.environ["MASTER_ADDR"], port, 2, rank == 0, datetime.timedelta(seconds=60))
for pair in sys.argv[4:]:
    name, value = pair.split("=", 1)
    os.environ[name] = value
    if pair == "stays=away" and rank == 1:
        continue
    vendor = "nvidia" if name == "NCCL_SOCKET_IFNAME" else "cpu"
    try:
        meeting.meet(dist.PrefixStore(pair, store), tiny_run(nnodes=2, dp=2, vendor=vendor, rdzv_timeout=5), rank)
        print(f"{pair}: met")
    except UsageError as error:
        print(f"{pair}: {error}")
    del os.environ[name]
store.set(f"done/{rank}", "")
if rank == 0:  # whose process keeps the store
    store.wait(["done/1"])
