"""Run: python -m pytest tests/test_quantize.py. Oracles: NumPy, finite differences, sums by hand, k-means."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from scipy.cluster.vq import kmeans2
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import get_ema_multi_avg_fn

import checkpoint
from evaluation import metrics
from model import count_parameters
from runtime import distributed
from variants import quantize, sizes
from variants.build import build
from variants.config import AutoencoderConfig
from variants.quantize import Quantized, VectorQuantizer, nearest, revival_slots, vq_loss

KINDS = ("gradient", "ema")
TINY = dict(encoder="sd", levels=2, sd_channels=8, decoder_channels=8, decoder_blocks=1, latent_channels=3,
            codebook_size=16)  # fmt: skip


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quantizer(codebook, update: str = "gradient") -> VectorQuantizer:
    """A quantiser with these entries, all of them alive."""
    codebook = torch.as_tensor(codebook)
    module = VectorQuantizer(*codebook.shape, update).to(codebook.dtype)
    with torch.no_grad():
        module.codebook.copy_(codebook)
        module.idle.zero_()
        if module.ema:
            module.ema_sum.copy_(codebook)
    return module


def column(*values: float) -> torch.Tensor:
    """These numbers as a latent of one channel, (1, 1, N, 1)."""
    return torch.tensor(values).view(1, 1, -1, 1)


def slots(*values: int) -> torch.Tensor:
    return torch.tensor(values).view(1, -1, 1)


def seeded(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + step)


# ------------------------------------------------------------------------------------------------------------
# the nearest entry


@pytest.mark.parametrize("at_once", [2**24, 100, 1])
def test_nearest_entry(monkeypatch, at_once):
    """The entry of least distance, as NumPy finds it in float64; how many are compared at once is nothing."""
    monkeypatch.setattr(quantize, "DISTANCES", at_once)
    z, codebook = normal(2, 4, 5, 7), normal(64, 4, seed=1)
    out = quantizer(codebook)(z)
    vectors = z.permute(0, 2, 3, 1).double().numpy()
    distances = ((vectors[..., None, :] - codebook.double().numpy()) ** 2).sum(axis=-1)
    assert np.array_equal(out.indices.numpy(), distances.argmin(axis=-1))
    assert out.indices.unique().numel() > 25
    expected = codebook.numpy()[out.indices.numpy()].transpose(0, 3, 1, 2)
    for tensor in (out.mean, out.entries):
        assert np.array_equal(tensor.detach().numpy(), expected)
    assert out.sample(z) is out.mean


def test_close_entries_far_from_zero():
    """1e-3 apart at 1000, where |z|^2 - 2ze + |e|^2 has no digit left; of two equal entries the first."""
    codebook = torch.tensor([[1000.0], [1000.001], [1000.002], [1000.001]])
    assert nearest(torch.tensor([[1000.0011], [1000.0019]]), codebook).tolist() == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_whatever_autocast(kind):
    """bf16 autocast changes no bit; half inputs and a half model give an fp32 code; float64 stays."""
    z, module = normal(1, 4, 6, 6), quantizer(normal(32, 4, seed=1), kind)
    exact = module(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(module(z), exact, strict=True):
            assert torch.equal(a, b)
    assert module(z.half()).mean.dtype == module.half()(z.half()).mean.dtype == torch.float32
    assert module.double()(z.double()).mean.dtype == torch.float64


# ------------------------------------------------------------------------------------------------------------
# gradients


def test_gradient_passes_straight_through():
    """Of any function of the code, d/dz is the derivative at the entry, and the codebook's is none."""
    z = normal(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    module = quantizer(normal(8, 3, seed=1, dtype=torch.float64))
    out = module(z)
    assert not torch.equal(out.mean, z)
    (out.mean**3).sum().backward()
    assert torch.equal(z.grad, 3 * out.entries.detach() ** 2) and module.codebook.grad is None


def differences(f, x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Central differences of f by each element of x, float64."""
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x).view(-1).index_fill(0, torch.tensor([i]), eps).view_as(x)
        out.view(-1)[i] = (f(x + step) - f(x - step)) / (2 * eps)
    return out


def test_each_term_of_the_loss_has_one_gradient():
    """The loss is 1.25 mean (z - e)^2 in value; z has a fifth of its derivative, e the other four."""
    z = normal(1, 2, 3, 2, dtype=torch.float64).requires_grad_()
    module = quantizer(normal(4, 2, seed=1, dtype=torch.float64))
    loss = vq_loss(module(z))
    loss.backward()
    codebook = module.codebook.detach().clone()
    by_hand = ((z - module(z).entries) ** 2).mean().item()
    assert loss.item() == pytest.approx(1.25 * by_hand, rel=1e-12)
    by_z = differences(lambda moved: vq_loss(module(moved)).item(), z.detach())
    by_e = differences(lambda moved: vq_loss(quantizer(moved)(z)).item(), codebook)
    assert torch.allclose(z.grad, by_z * 0.2, atol=1e-8) and z.grad.abs().min() > 1e-3
    assert torch.allclose(module.codebook.grad, by_e * 0.8, atol=1e-8) and by_e.abs().max() > 0.1


def test_moving_average_takes_no_gradient():
    """With update="ema" the loss reaches z alone."""
    z, module = normal(1, 2, 3, 3).requires_grad_(), quantizer(normal(4, 2), "ema")
    vq_loss(module(z)).backward()
    assert z.grad.abs().sum() > 0 and module.codebook.grad is None and not module.codebook.requires_grad


# ------------------------------------------------------------------------------------------------------------
# the moving average, revival, and what the log shows, by hand


def test_moving_average_by_hand():
    """Entries 0, 10, 50 and vectors 1, 2, 9: N = .99 N + .01 n, m = .99 m + .01 sum, e = m / N."""
    module = quantizer([[0.0], [10.0], [50.0]], "ema")
    for _ in range(2):
        table = module.statistics(module(column(1, 2, 9)), slots(9, 9, 9))
        module.update(table)
    # by hand: N1 = .99 + .02 = 1.01, m1 = .03; then N1 = .9999 + .02, m1 = .0297 + .03
    expected = [0.0597 / 1.0199, 0.99 * 9.99 + 0.09, 50.0]
    assert module.codebook.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert module.ema_count.tolist() == pytest.approx([1.0199, 1.0, 0.9801], rel=1e-6)
    assert module.idle.tolist() == [0, 0, 2]


def test_gradient_codebook_is_moved_by_the_optimizer_alone():
    """update() of a gradient codebook changes no living entry."""
    module = quantizer([[0.0], [10.0], [50.0]])
    module.update(module.statistics(module(column(1, 2, 9)), slots(0, 1, 2)))
    assert module.codebook.flatten().tolist() == [0, 10, 50] and module.idle.tolist() == [0, 0, 1]


def test_table_of_statistics():
    """Count, sum, candidates and their sum per entry; a slot beyond the last entry is nobody's candidate."""
    module = quantizer([[0.0], [10.0], [50.0]])
    table = module.statistics(module(column(1, 2, 9)), slots(1, 3, 0))
    assert table.tolist() == [[2, 3, 1, 9], [1, 9, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_revival_by_hand(monkeypatch, kind):
    """An entry idle for three steps becomes its candidate, with a fresh average; without one it waits."""
    monkeypatch.setattr(quantize, "REVIVE_AFTER", 3)
    module = quantizer([[0.0], [50.0], [90.0]], kind)
    seen = []
    for step in range(4):
        offer = slots(1, 7) if step < 3 else slots(2, 7)
        module.update(module.statistics(module(column(-4.0, 0.0)), offer))
        seen += [*module.codebook[1:].flatten().tolist(), *module.idle.tolist()]
    assert seen == pytest.approx([50, 90, 0, 1, 1, 50, 90, 0, 2, 2, -4, 90, 0, 0, 3, -4, -4, 0, 0, 0])
    if kind == "ema":
        assert module.ema_count[1:].tolist() == pytest.approx([1.0, 1.0])
        assert torch.allclose(module.ema_sum, module.codebook * module.ema_count[:, None])


@pytest.mark.parametrize("kind", KINDS)
def test_first_step_draws_the_codebook_from_the_data(kind):
    """All entries start dead: after one step each that was not chosen is an encoder output; all differ."""
    torch.manual_seed(0)
    module, z = VectorQuantizer(8, 2, kind), normal(1, 2, 5, 5) + 3
    posterior = module(z)
    module.update(module.statistics(posterior, revival_slots(25, 8, seeded(0)).view(1, 5, 5)))
    outputs = {tuple(v) for v in z[0].flatten(1).T.tolist()}
    drawn = [tuple(entry) for entry in module.codebook.tolist()]
    chosen = set(posterior.indices.flatten().tolist())
    assert len(set(drawn)) == 8 > 2 * len(chosen) and module.idle.tolist() == [0] * 8
    assert all((entry in outputs) == (k not in chosen) for k, entry in enumerate(drawn))


def test_slots():
    """All different, the same for equal generators, and no entry is left out where vectors are few."""
    many, again, other = (revival_slots(50, 20, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(many, again) and not torch.equal(many, other)
    assert sorted(many.tolist()) == list(range(50))                   # each of 20 entries has a candidate
    few = [revival_slots(5, 20, seeded(seed)) for seed in range(60)]
    assert all(len(set(draw.tolist())) == 5 for draw in few)
    assert set(torch.cat(few).tolist()) == set(range(20))


def test_usage_and_perplexity():
    """Choices 2, 2, 0, 0 of four entries: half are used, perplexity 2; 3 and 1: 4 / 3^(3/4) by hand."""
    module = quantizer([[0.0], [10.0], [50.0], [90.0]])
    for values, perplexity in (((0, 1, 9, 11), 2.0), ((0, 1, 2, 11), 4 / 3**0.75)):
        seen = module.update(module.statistics(module(column(*values)), slots(9, 9, 9, 9)))
        assert seen["usage"] == 0.5 and seen["perplexity"].item() == pytest.approx(perplexity, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_learns_as_k_means(kind):
    """Fed with one cloud, the codebook comes within 10% of the error of SciPy's k-means, from 0.01 of it."""
    z = normal(1, 2, 20, 20)
    points = z[0].flatten(1).T.double().numpy()
    centres, labels = kmeans2(points, 16, minit="++", seed=0, iter=100)
    best = ((points - centres[labels]) ** 2).mean()
    torch.manual_seed(0)
    module = VectorQuantizer(16, 2, kind)
    assert ((z - module(z).mean) ** 2).mean() > 5 * best
    adam = torch.optim.Adam([module.codebook], lr=0.02)
    for step in range(300):
        posterior = module(z)
        if kind == "gradient":
            adam.zero_grad()
            vq_loss(posterior).backward()
            adam.step()
        module.update(module.statistics(posterior, revival_slots(400, 16, seeded(step)).view(1, 20, 20)))
    assert ((z - module(z).mean) ** 2).mean() < 1.1 * best


# ------------------------------------------------------------------------------------------------------------
# in the autoencoder: a small loop as train.py's, in one process or two, straight on or resumed


class Loop:
    """An autoencoder with a codebook, its optimizer, and steps as train.py makes them."""

    def __init__(self, kind: str):
        torch.manual_seed(0)
        self.net = build(AutoencoderConfig(**TINY, codebook_update=kind))
        self.opt = torch.optim.Adam([p for p in self.net.parameters() if p.requires_grad], lr=1e-2)
        self.seen: dict[str, torch.Tensor] = {}

    def step(self, step: int, micro: int, wrapped=None) -> None:
        """One update on four images: this process's share of them, in micro-batches of `micro`."""
        x, net = normal(4, 3, 16, 16, seed=step), wrapped or self.net
        draw = revival_slots(4 * 16, TINY["codebook_size"], seeded(step)).view(4, 4, 4)
        share = 4 // distributed.world_size()
        first = distributed.rank() * share
        table = 0
        for start in range(first, first + share, micro):
            rows = slice(start, start + micro)
            recon, posterior = net(x[rows])
            loss = (recon - x[rows]).square().mean() + vq_loss(posterior)
            (loss * micro / share).backward()
            table = table + self.net.quantizer.statistics(posterior, draw[rows])
        self.opt.step()
        self.opt.zero_grad()
        self.seen = self.net.quantizer.update(distributed.sum_(table))

    def state(self) -> dict:
        return {"net": self.net.state_dict(), "opt": self.opt.state_dict(), "seen": self.seen}


def worker(rank: int, port: int, folder: Path) -> None:
    """One of two processes: three steps on its half of the images, with each kind of codebook."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init("cpu")
    quantize.REVIVE_AFTER = 2
    for kind in KINDS:
        loop = Loop(kind)
        wrapped = DDP(loop.net, broadcast_buffers=False)
        for step in range(4):
            loop.step(step, micro=2, wrapped=wrapped)
        torch.save(loop.state(), folder / f"{kind}{rank}.pt")
    del wrapped                                           # it holds the process group
    distributed.cleanup()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A folder with what two processes ended in."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(two, monkeypatch, kind):
    """Bitwise the same state on both; that of one process on the joined batch, whole or accumulated.

    Revived entries, choices and idle counts are equal, sums to fp32's rounding.
    """
    monkeypatch.setattr(quantize, "REVIVE_AFTER", 2)
    first, second = (torch.load(two / f"{kind}{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, tensor in first["net"].items():
        assert torch.equal(tensor, second["net"][name]), name
    for micro in (4, 1):
        loop = Loop(kind)
        start = loop.net.quantizer.codebook.clone()
        for step in range(4):
            loop.step(step, micro)
        one = loop.net.state_dict()
        assert torch.equal(one["quantizer.idle"], first["net"]["quantizer.idle"])
        for name in (name for name in one if name.startswith("quantizer.")):
            assert torch.allclose(one[name], first["net"][name], rtol=1e-4, atol=1e-5), name
        assert loop.seen["usage"] == first["seen"]["usage"] == second["seen"]["usage"] > 0
        assert loop.seen["perplexity"].item() == pytest.approx(first["seen"]["perplexity"].item(), rel=1e-6)
        assert (one["quantizer.codebook"] - start).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bitwise(monkeypatch, tmp_path, kind):
    """Six steps, or three, a file, and three more: every bit of weights, codebook, counts and optimizer."""
    monkeypatch.setattr(quantize, "REVIVE_AFTER", 2)
    straight, before, after = Loop(kind), Loop(kind), Loop(kind)
    for step in range(6):
        straight.step(step, micro=4)
    for step in range(3):
        before.step(step, micro=4)
    torch.save(before.state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    after.net.load_state_dict(state["net"])
    after.opt.load_state_dict(state["opt"])
    for step in range(3, 6):
        after.step(step, micro=4)
    for name, tensor in straight.net.state_dict().items():
        assert torch.equal(tensor, after.net.state_dict()[name]), name
    assert straight.seen == after.seen


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_and_evaluation(tmp_path, kind):
    """load_model rebuilds the quantiser from the file, and metrics.evaluate needs to know nothing of it."""
    loop = Loop(kind)
    loop.step(0, micro=4)
    config = {**TINY, "codebook_update": kind}
    state = dict(step=1, config=config, args={}, model=loop.net.state_dict(), ema=None)
    checkpoint.save(tmp_path, state, keep=0)
    net, _ = checkpoint.load_model(tmp_path / "ckpt.pt")
    x = normal(2, 3, 16, 16).clamp(-1, 1)
    assert torch.equal(net(x)[0], loop.net(x)[0]) and torch.equal(net.decode(net.encode(x).mean), net(x)[0])
    pictures = (x * 127.5 + 127.5).to(torch.uint8)
    assert metrics.evaluate(net, [pictures], torch.device("cpu"))["n"] == 2


def test_average_of_weights_has_the_codebook():
    """torch's EMA runs over parameters(), and a moving-average codebook is among them."""
    loop = Loop("ema")
    average = [p.detach().clone() for p in loop.net.parameters()]
    loop.step(0, micro=4)
    get_ema_multi_avg_fn(0.0)(average, list(loop.net.parameters()), 0)
    position = [name for name, _ in loop.net.named_parameters()].index("quantizer.codebook")
    assert torch.equal(average[position], loop.net.quantizer.codebook)


def test_counts():
    """KL-f8's pyramid without the log-variance half of its last layer, and 1x1 convs of n_z alone.

    18,436 = 512 * 9 * 4 + 4 fewer parameters than FIGURES.md 3's encoder; the decoder is the same.
    """
    for name, levels, nz, entries in (("vq-f8", 3, 4, 16_384), ("vq-f4", 2, 3, 8_192)):
        config = sizes.PRESETS[name]
        with torch.device("meta"):
            net = build(config)
        assert (config.levels, config.latent_channels, config.codebook_size) == (levels, nz, entries)
        assert count_parameters(net.quantizer) == entries * nz
        assert count_parameters(net.quant_conv) == count_parameters(net.post_quant_conv) == nz * nz + nz
        if name == "vq-f8":
            assert count_parameters(net.encoder) == 34_163_592 - 18_436
            assert count_parameters(net.decoder) == 49_490_179


@pytest.mark.parametrize("encoder", ["sd", "litevae"])
def test_autoencoder_with_a_codebook(encoder):
    """The posterior's mean are entries, noise is nothing to it, and every parameter gets a gradient."""
    torch.manual_seed(0)
    small = dict(extractor_channels=8, extractor_mult=(1,), aggregator_channels=8, aggregator_mult=(1,))
    net = build(AutoencoderConfig(**TINY | small | dict(encoder=encoder, conv1x1=True)))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        x = normal(2, 3, 16, 24)
        net.quantizer.codebook.copy_(net.encode(x).z.movedim(1, -1).flatten(0, 2)[:16] + 0.01)
    recon, posterior = net(x, noise=normal(2, 3, 4, 6))
    assert isinstance(posterior, Quantized) and posterior.mean.shape == (2, 3, 4, 6)
    assert torch.equal(recon, net(x)[0]) and torch.equal(recon, net.decode(posterior.mean))
    assert {tuple(v) for v in posterior.mean.movedim(1, -1).flatten(0, 2).tolist()} <= {
        tuple(entry) for entry in net.quantizer.codebook.tolist()}
    (recon.square().mean() + vq_loss(posterior)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
