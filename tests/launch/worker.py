"""A worker without torch: `worker.py SECONDS [--save S] [--fail RANK=STATUS] [--spam N]`; saves on SIGTERM."""

import argparse
import json
import os
import signal
import sys
import time

from megatron_rocm.platform.process import die_with_parent, write_whole_lines

die_with_parent()
write_whole_lines()
parser = argparse.ArgumentParser()
parser.add_argument("seconds", type=float)
parser.add_argument("--save", type=float, default=0)
parser.add_argument("--fail", default="")
parser.add_argument("--spam", type=int, default=0)
parser.add_argument("--status", default="")
options = parser.parse_args()
rank = os.environ["RANK"]
signals: list[int] = []
signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
signal.signal(signal.SIGUSR1, lambda number, frame: print(f"rank {rank} is to save"))

if options.spam:
    time.sleep(2 - time.time() % 2)  # all ranks at once
for line in range(options.spam):
    print(f"\x1b[3{rank}m{rank}", line, "x" * 300, sep="|")
print(f"rank {rank} pid {os.getpid()} is up")
end = time.monotonic() + options.seconds
while time.monotonic() < end and not signals:
    time.sleep(0.02)
outcome = {"outcome": "stopped" if signals else "finished", "iteration": 7, "train_iters": 12, "checkpoint": "ckpt/7"}
if signals:
    time.sleep(options.save)
    print(f"rank {rank} saved after {len(signals)} signals")
if options.status and rank == "0":
    with open(options.status, "w") as file:
        json.dump(outcome, file)
failing, _, status = options.fail.partition("=")
if failing == rank:
    if int(status) < 0:
        os.kill(os.getpid(), -int(status))
    sys.exit(int(status))
