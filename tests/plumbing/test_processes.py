"""Two processes compute what one does; how they join under torchrun."""

import gc
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import isa
from plumbing import processes
from plumbing.processes import agree, from_the_first, gather, join_processes


def case():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(5, 4), torch.randn(8, 5)
    return model, x, F.normalize(torch.randn(8, 4), dim=-1)


def one_of_two(rank, port, folder):
    """Save what this process computes; it is one of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(half(rank), f"{folder}/{rank}.pt")
    gc.collect()  # as run_command ends
    dist.destroy_process_group()


def half(rank):
    """Gradients of GCD from this process's half of eight samples, as train.py computes them."""
    model, x, v = case()
    mine = slice(4 * rank, 4 * rank + 4)
    speak = torch.nn.parallel.DistributedDataParallel(model)
    t = F.normalize(speak(x[mine]), dim=-1)
    loss = isa.global_contrastive_distillation(gather(v[mine]), gather(t), 0.1)
    loss.backward()
    said = [processes.process(), agree(torch.tensor(1.0 + rank), 3 * rank), from_the_first(rank)]
    return [said, loss.detach(), *(p.grad for p in model.parameters())]


def test_two_processes_give_the_loss_and_gradients_of_one(tmp_path):
    model, x, v = case()
    loss = isa.global_contrastive_distillation(gather(v), F.normalize(model(x), dim=-1), 0.1)
    loss.backward()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(one_of_two, (port, tmp_path), nprocs=2)
    for rank in range(2):
        said, *found = torch.load(tmp_path / f"{rank}.pt")
        assert said == [(rank, 2), [1.5, 1.5], 0]
        for ours, expected in zip(found, [loss, *(p.grad for p in model.parameters())],
                                  strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert (processes.process(), agree(torch.tensor(1.5), 2), from_the_first(7)) == (
        (0, 1), [1.5, 2.0], 7)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_each_process_has_a_gpu_of_its_own(monkeypatch, device):
    joined = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: joined.append(backend))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    assert join_processes(device) == device and joined == []  # without torchrun
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert join_processes(device) == "cuda:1" and joined == ["cuda:1", "nccl"]
    assert join_processes("cpu") == "cpu" and joined[2:] == ["gloo"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"more processes than GPUs here \(2\); lower --nproc"):
        join_processes(device)
