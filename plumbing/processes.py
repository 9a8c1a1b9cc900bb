"""How processes under torchrun meet and what they exchange; a single one does nothing here."""

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist


def process():
    """(rank of this process, number of processes): (0, 1) without torchrun."""
    here = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if here else (0, 1)


def wait_for_all():
    if process()[1] > 1:
        dist.barrier()


def from_the_first(value):
    values = [value]
    if process()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def gather(x):
    """[b, E] of this process -> [B, E] of all, in the order of ranks.

    Gradients flow through its own rows only, times the number of processes: DDP divides by it.
    """
    rank, processes = process()
    if processes == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(processes)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[rank] = x.detach() + processes * (x - x.detach())  # x itself, with its gradient scaled
    return torch.cat(parts)


def agree(*values):
    """Means over all processes of some scalars, the first a tensor, as floats; one sync for all."""
    like = dict(dtype=torch.float32, device=values[0].device)
    values = torch.stack([torch.as_tensor(v, **like).detach() for v in values])
    if process()[1] > 1:
        dist.all_reduce(values)
    return (values / process()[1]).tolist()


def join_processes(device):
    """Under torchrun, join the other processes -> this one's device: its own GPU, or the CPU.

    Raises ValueError if there are more processes than GPUs, or if they cannot meet.
    """
    if "WORLD_SIZE" not in os.environ:
        return device
    if torch.device(device).type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"more processes than GPUs here ({count}); lower --nproc_per_node")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    # DDP warns of the memory layout of 1x1 convolutions' gradients; for 1x1 all are the same
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    try:
        hours = timedelta(hours=12)  # storing features may take long
        dist.init_process_group("nccl" if "cuda" in device else "gloo", timeout=hours)
    except (RuntimeError, ValueError) as error:  # port taken, or no first process
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(f"the processes cannot meet at {where} ({str(error).splitlines()[0]}); "
                         "`torchrun --standalone` finds a free port") from None
    return device
