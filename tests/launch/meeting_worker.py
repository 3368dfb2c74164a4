"""`meeting_worker.py MASTER PORT RANK NAME=VALUE …`: a node's first process, as far as the nodes' meeting.

They meet once for each NAME=VALUE, which is in the environment for that time.
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
    try:
        meeting.meet(dist.PrefixStore(pair, store), tiny_run(nnodes=2, dp=2), rank)
        print(f"{pair}: met")
    except UsageError as error:
        print(f"{pair}: {error}")
    del os.environ[name]
store.set(f"done/{rank}", "")
if rank == 0:  # whose process keeps the store
    store.wait(["done/1"])
