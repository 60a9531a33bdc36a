"""Run: python -m pytest tests/test_optimizers.py. Muon against an SVD in float64 and torch.optim.Muon."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import Run, crash, equal, train_in
from torch import Tensor, nn
from torch.optim import _muon
from torch.utils.flop_counter import FlopCounterMode

import optimizers
from runtime import distributed
from variants.build import build
from variants.config import scale_config

SHAPES = [(3, 40), (16, 16), (40, 3), (64, 576)]


def by_svd(x: Tensor) -> Tensor:
    """U S' V^T in float64, with five times the polynomial on the singular values of x / |x|."""
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(dim=-1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s[..., None, :] @ vt


def matrices(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in 2 * SHAPES]


def test_rate_scale():
    """1 for vectors and up to 144 inputs, 16 channels of a 3x3 convolution; then 144 over the inputs."""
    shapes = {(512,): 1, (): 1, (64, 16, 3, 3): 1, (9, 144): 1, (24, 32, 3, 3): 1 / 2, (8, 512, 3, 3): 1 / 32}
    for shape, scale in shapes.items():
        assert optimizers.rate_scale(nn.Parameter(torch.zeros(shape))) == scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decades", [0, 4])
def test_orthogonalise(shape, decades):
    """Equal to the SVD to 1e-3 of the norm, with singular values down to 1e-4 of the largest, in a batch."""
    x = torch.stack([m for m in matrices(3) if m.shape == shape])
    x = x * torch.logspace(0, -decades, shape[1])
    ours, exact = optimizers.orthogonalise(x), by_svd(x)
    assert (ours - exact).norm() < 1e-3 * exact.norm()
    assert torch.allclose(ours[1], optimizers.orthogonalise(x[1]), atol=1e-5)


def test_singular_values():
    """A matrix far from orthogonal comes out with all of them between 0.65 and 1.25; a zero one stays 0."""
    x = torch.randn(32, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 512)
    s = torch.linalg.svdvals(optimizers.orthogonalise(x))
    assert 0.65 < s.min() and s.max() < 1.25
    assert not optimizers.orthogonalise(torch.zeros(4, 9)).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flops(shape):
    """The stated cost is what torch counts; a 512 x 4608 convolution takes 0.38 of the direct form."""
    with FlopCounterMode(display=False) as counter:
        optimizers.orthogonalise(torch.randn(shape))
    assert counter.get_total_flops() == optimizers.flops(*shape)
    direct = 5 * (4 * 512**2 * 4608 + 2 * 512**3)
    assert optimizers.flops(512, 4608) / direct == pytest.approx(0.37, abs=0.01)


def ten_steps(optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    """The parameters after ten steps, each along `matrices` of another seed."""
    for step in range(10):
        for p, gradient in zip(params, matrices(step), strict=True):
            p.grad = gradient.view_as(p)
        optimizer.step()
    return [p.detach() for p in params]


def test_equals_torch(monkeypatch):
    """Ten steps of torch.optim.Muon: to 1e-6 with our orthogonalisation in it, to bf16's 2% with its own."""
    def theirs():
        params = [nn.Parameter(torch.zeros_like(m)) for m in matrices()]
        return ten_steps(torch.optim.Muon(params, lr=0.1, weight_decay=0, momentum=0.95,
                                          adjust_lr_fn="match_rms_adamw"), params)

    params = [nn.Parameter(torch.zeros_like(m)) for m in matrices()]
    ours, bf16 = ten_steps(optimizers.Muon(params, lr=0.1), params), theirs()
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", lambda x, *_: optimizers.orthogonalise(x))
    for a, b, c in zip(ours, theirs(), bf16, strict=True):
        assert (a - b).abs().max() < 1e-6
        assert (a - c).norm() < 0.02 * a.norm()


def test_a_convolution_is_a_matrix():
    """(C', C, 3, 3) moves as (C', 9 C) does."""
    conv, matrix = nn.Parameter(torch.zeros(4, 2, 3, 3)), nn.Parameter(torch.zeros(4, 18))
    gradient = torch.randn(4, 18, generator=torch.Generator().manual_seed(0))
    conv.grad, matrix.grad = gradient.view(4, 2, 3, 3), gradient
    optimizers.Muon([conv, matrix], lr=1.0).step()
    assert torch.equal(conv.detach().flatten(1), matrix.detach())
    assert matrix.detach().norm() == pytest.approx(0.2 * 18**0.5 * by_svd(gradient).norm().item(), rel=1e-4)


def test_who_trains_what():
    """Of LiteVAE-B, Muon has the weights of all convolutions but the first and last of each network."""
    with torch.device("meta"):
        model = build(scale_config("B"))
    names = {id(p): name for name, p in model.named_parameters()}
    inner, others = ([names[id(p)] for p in part] for part in optimizers.split_parameters(model))
    assert sorted(inner + others) == sorted(names.values())
    assert all(name.endswith(".weight") for name in inner)
    edges = ["encoder.extractors.0.conv_in.weight", "encoder.aggregator.conv_out.weight",
             "decoder.conv_in.weight", "decoder.conv_out.weight", "decoder.mid.0.conv1.scales"]
    assert set(edges) <= set(others) and "decoder.mid.0.conv1.conv.weight" in inner
    assert sum(model.get_parameter(name).numel() for name in inner) == 55_070_720


def worker(rank: int, world: int, port: int, folder: Path) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init("cpu")
    params = [nn.Parameter(torch.zeros_like(m)) for m in matrices()]
    optimizer = optimizers.Muon(params, lr=0.1)
    moved = ten_steps(optimizer, params)
    torch.save({"moved": moved, "state": optimizer.state_dict()}, folder / f"{world}-{rank}.pt")
    distributed.cleanup()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_work(tmp_path, world):
    """2 and 4 processes, each with a share of the matrices, move all of them as one does, to 1e-6."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (world, port, tmp_path), nprocs=world)
    params = [nn.Parameter(torch.zeros_like(m)) for m in matrices()]
    alone = ten_steps(optimizers.Muon(params, lr=0.1), params)
    results = [torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    assert all(equal(results[0], result) for result in results)
    for a, b in zip(alone, results[0]["moved"], strict=True):
        assert (a - b).abs().max() < 1e-6


def test_no_matrix_is_left_out_or_done_twice(monkeypatch):
    """Over 3 processes each matrix has one owner, and no share is twice another."""
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    done, load = [], []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "sum_", lambda joined: joined)
        updates = optimizers.share_work([m for m in matrices() for _ in range(3)])
        done.append([bool(update.any()) for update in updates])
        costs = [optimizers.flops(*update.shape) for update in updates]
        load.append(sum(cost for cost, mine in zip(costs, done[-1], strict=True) if mine))
    assert [sum(owners) for owners in zip(*done, strict=True)] == [1] * 24
    assert max(load) < 2 * min(load)


def test_training_resumes_exactly(tmp_path, monkeypatch):
    """--optimizer muon: saved after 2 steps, dead in the 4th, resumed: every bit as if nothing had been."""
    flags = "--optimizer muon --steps 4 --lr 1e-3"
    straight = train_in(tmp_path, f"{flags} --out straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash(patch, 3)
        train_in(tmp_path, f"{flags} --save-every 2 --out {tmp_path}/run")
    assert Run(tmp_path / "run").state()["step"] == 2
    resumed = train_in(tmp_path, f"{flags} --resume")
    for name in ("model", "ema", "opt", "opt_muon"):
        assert equal(straight.state()[name], resumed.state()[name]), name
    assert straight.lines == resumed.lines


def test_training_moves_all(tmp_path):
    """Every tensor of the model moves in two steps, by Muon or by Adam; the two share the parameters."""
    run = train_in(tmp_path, "--optimizer muon --save-every 1 --keep 9")
    first, last = run.state("ckpt-00000001.pt"), run.state()
    assert all(not torch.equal(first["model"][name], last["model"][name]) for name in last["model"])
    counts = [len(last[name]["state"]) for name in ("opt", "opt_muon")]
    assert min(counts) > 0 and sum(counts) == len(last["model"])


def test_another_optimizer_is_refused(tmp_path, refused, capsys):
    """A run goes on with the optimizer that it began with."""
    train_in(tmp_path, "--optimizer muon --steps 1")
    capsys.readouterr()
    line = refused("train", "--data synthetic --scale S --dec-channels 8 --dec-blocks 1 --res 32 --disc none "
                            "--lpips-weight 0 --device cpu --out run --resume")
    assert "was trained with optimizer=muon, the flags ask for adam" in line
