"""Worker of test_environment.py: joins the process group, triggers noisy library code and prints its rank."""

import json
import os
import sys

import torch
import torch.distributed as dist

from recurrent_bart.training.environment import start_processes
from tiny import tiny_model

environment = start_processes(timeout_minutes=1)
gathered = torch.zeros(environment.world_size)
dist.all_gather_into_tensor(gathered, torch.ones(1))
if environment.rank == 0:
    tiny_model().save_pretrained(sys.argv[1])
    print(
        json.dumps(
            {
                "rank": environment.rank,
                "local_rank": environment.local_rank,
                "world_size": environment.world_size,
                "device": environment.device.type,
                "backend": dist.get_backend(),
                "gathered": gathered.sum().item(),
                "set": sorted(name for name in os.environ if name in ("RANK", "MASTER_PORT")),
            }
        )
    )
dist.destroy_process_group()
