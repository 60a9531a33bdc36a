"""Run: pytest tests/downstream/test_pretrained.py. The folder, and diffusers' own code on our model."""

import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from conftest import equal, tiny_checkpoint
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    UNet2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.ltx.pipeline_ltx_latent_upsample import retrieve_latents
from PIL import Image
from safetensors.torch import load_file

from checkpoint import load_model
from downstream.pretrained import CONFIG, WEIGHTS, DiffusersConfig, PretrainedAutoencoder
from model import GROUP
from variants.foreign import load_diffusers

LATENTS = {"scaling_factor": 0.4, "shift_factor": -0.25, "latents_mean": [0.1, 0.2, 0.3, 0.4], "images": 8}
SYSTEMS = {
    "litevae": {},
    "wavelet output": dict(output="wavelet", wavelet="db2"),
    "sd-vae": dict(encoder="sd", sd_channels=32, conv1x1=True, **GROUP),
    "codebook": dict(codebook_size=16, codebook_update="ema"),
    "dwt": dict(encoder="dwt", latent_channels=12),
}


def random_images(batch: int, h: int = 16, w: int = 24) -> torch.Tensor:
    return torch.rand(batch, 3, h, w, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    """A checkpoint with statistics of its latents; left as it is."""
    return tiny_checkpoint(tmp_path_factory.mktemp("ckpt"), LATENTS)


@pytest.fixture(scope="module")
def vae(ckpt) -> PretrainedAutoencoder:
    return PretrainedAutoencoder.from_checkpoint(ckpt).requires_grad_(False)


# ---- the folder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_round_trip(tmp_path, system):
    """Tensors, architecture and statistics come back bit for bit, and so do encode and decode."""
    path = tiny_checkpoint(tmp_path, LATENTS, **SYSTEMS[system])
    model, state = load_model(path)
    PretrainedAutoencoder.from_checkpoint(path).save_pretrained(tmp_path / "folder")
    vae = PretrainedAutoencoder.from_pretrained(tmp_path / "folder")
    assert not vae.training and vae.model.config == model.config and vae.latents == LATENTS
    assert equal(dict(vae.model.state_dict()), dict(state["ema"]))
    assert equal(load_file(tmp_path / "folder" / WEIGHTS), state["ema"])       # safetensors' own reader
    x = random_images(2)
    mean = model.encode(x).mean
    assert torch.equal(vae.encode(x).latent_dist.mode(), mean)
    assert torch.equal(vae.decode(mean).sample, model.decode(mean))


def test_config_json(ckpt, vae, tmp_path):
    """Readable JSON: architecture, statistics, and origin without flags or paths of this machine."""
    vae.save_pretrained(tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["architecture"] == json.loads(json.dumps(asdict(vae.model.config)))
    assert written["latents"] == LATENTS
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    assert {key: written["origin"][key] for key in ("step", "git", "weights")} == {
        "step": 3, "git": "abc", "weights": "EMA"}
    assert len(written["origin"]["sha256"]) == 64 and str(ckpt.parent) not in json.dumps(written)


def test_raw_weights_and_no_statistics(tmp_path):
    """raw takes the weights of training; without statistics the scale is 1 and the shift 0."""
    path = tiny_checkpoint(tmp_path)
    vae, raw = (PretrainedAutoencoder.from_checkpoint(path, raw=raw) for raw in (False, True))
    state = load_model(path)[1]
    assert equal(dict(raw.model.state_dict()), dict(state["model"])) and raw.origin["weights"] == "raw"
    assert equal(dict(vae.model.state_dict()), dict(state["ema"])) and vae.latents is None
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.0, 0.0)


def test_nothing_is_overwritten(vae, tmp_path, monkeypatch):
    """One file in the way is enough; force replaces; a disk that fills up leaves both old files."""
    (tmp_path / WEIGHTS).write_text("mine")
    with pytest.raises(ValueError, match="already holds model.safetensors: choose another folder, or give"):
        vae.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    (tmp_path / CONFIG).write_text("mine, too")
    write = Path.write_bytes

    def full(path: Path, content: bytes):
        write(path, content[:10])
        if CONFIG in path.name:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_bytes", full)
        vae.save_pretrained(tmp_path, force=True)
    assert [(tmp_path / name).read_text() for name in (WEIGHTS, CONFIG)] == ["mine", "mine, too"]
    assert len(list(tmp_path.iterdir())) == 2
    vae.save_pretrained(tmp_path, force=True)
    assert PretrainedAutoencoder.from_pretrained(tmp_path).latents == LATENTS


DAMAGE = {
    "no config.json in ": lambda folder: (folder / CONFIG).unlink(),
    "no model.safetensors in ": lambda folder: (folder / WEIGHTS).unlink(),
    "config.json is not valid JSON": lambda folder: cut(folder / CONFIG),
    "config.json is not a JSON object": lambda folder: (folder / CONFIG).write_text("[]"),
    "model.safetensors is truncated or damaged": lambda folder: cut(folder / WEIGHTS),
    "config.json has no architecture: it was not written by export.py":
        lambda folder: edit(folder, "architecture", None),
    "a configuration this version does not know": lambda folder: edit(folder, "architecture", {"sides": 3}),
    "levels must be one of 2, 3, 4, got 7": lambda folder: edit(folder, "architecture", {"levels": 7}),
    "model.safetensors does not fit: encoder": lambda folder: edit(folder, "architecture", {"levels": 3}),
    "latents must have a scaling_factor above 0 and a finite shift_factor, got None and None":
        lambda folder: edit(folder, "latents", [1, 0]),
    "got 0 and 0.5": lambda folder: edit(folder, "latents", {"scaling_factor": 0, "shift_factor": 0.5}),
    "got 1 and nan": lambda folder: edit(folder, "latents", {"scaling_factor": 1, "shift_factor": math.nan}),
}  # fmt: skip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def edit(folder: Path, key: str, value) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {key: value}))


@pytest.mark.parametrize("line", DAMAGE)
def test_damaged_folder(vae, tmp_path, line):
    """One line that names the file and what is wrong with it."""
    vae.save_pretrained(tmp_path)
    DAMAGE[line](tmp_path)
    with pytest.raises(ValueError) as error:
        PretrainedAutoencoder.from_pretrained(tmp_path)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_hub_arguments(vae, tmp_path):
    """subfolder, torch_dtype and a variant of None are taken, as scripts pass them; a variant is refused."""
    vae.save_pretrained(tmp_path / "vae")
    load = PretrainedAutoencoder.from_pretrained
    half = load(str(tmp_path), subfolder="vae", torch_dtype=torch.bfloat16, revision=None, variant=None)
    assert half.dtype == torch.bfloat16 and half.config == vae.config
    with pytest.raises(ValueError, match="this reads a local folder: got 'fp16'"):
        load(tmp_path, subfolder="vae", variant="fp16")
    with pytest.raises(ValueError, match="no config.json in nowhere: expected a folder written by export.py"):
        load("nowhere")


# ---- the interface -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_equals_diffusers(tmp_path):
    """On the same weights, AutoencoderKL gives the same latents, samples, images and configuration."""
    torch.manual_seed(0)
    theirs = AutoencoderKL(
        block_out_channels=(32, 64, 128), layers_per_block=2, latent_channels=4, force_upcast=False,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.3, shift_factor=0.1).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = PretrainedAutoencoder(load_diffusers(tmp_path)[0], {"scaling_factor": 0.3, "shift_factor": 0.1})
    for field in fields(DiffusersConfig):
        value = getattr(theirs.config, field.name)
        assert getattr(ours.config, field.name) == (tuple(value) if isinstance(value, list) else value)
    ours, theirs, x = ours.double(), theirs.double(), random_images(2).double()
    (q,), (p,) = ours.encode(x, return_dict=False), theirs.encode(x, return_dict=False)
    samples = [dist.sample(torch.Generator().manual_seed(3)) for dist in (q, p)]
    z = p.mode()
    images = [ours.decode(z, return_dict=False, generator=None)[0], theirs.decode(z, return_dict=False)[0]]
    pairs = [(getattr(q, name), getattr(p, name)) for name in ("mean", "logvar", "std")]
    pairs += [samples, images, (q.mode(), z), (ours.decode(z).sample, theirs.decode(z).sample)]
    for a, b in pairs:
        assert a.dtype == b.dtype == torch.float64 and (a - b).abs().max() < 1e-10 < b.abs().mean()


@torch.no_grad()
def test_half_precision(ckpt):
    """After .to, inputs of any dtype are taken and outputs have the weights' dtype, as pipelines expect."""
    vae, x = PretrainedAutoencoder.from_checkpoint(ckpt), random_images(2)
    mean = vae.encode(x).latent_dist.mode()
    image = vae.decode(mean).sample
    vae.to("cpu", dtype=torch.bfloat16)
    assert vae.dtype == torch.bfloat16 and vae.device == torch.device("cpu")
    dist = vae.encode(x).latent_dist
    outputs = [dist.mode(), dist.sample(), dist.std, dist.logvar, vae.decode(mean).sample]
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    for half, full in ((dist.mode(), mean), (outputs[-1], image)):
        assert 0 < (half - full).abs().max() < 0.1 * full.abs().max()


@torch.no_grad()
def test_codebook(tmp_path):
    """The mode and every sample are the code; there is no variance to ask for."""
    model, _ = load_model(tiny_checkpoint(tmp_path, codebook_size=16))
    dist = PretrainedAutoencoder(model).encode(random_images(2)).latent_dist
    codes = dist.mode().movedim(1, -1).flatten(0, 2)
    assert (codes[:, None] == model.quantizer.codebook).all(dim=-1).any(dim=-1).all()
    assert torch.equal(dist.sample(torch.Generator().manual_seed(0)), dist.mode())
    for name in ("std", "logvar"):
        with pytest.raises(AttributeError, match="this model has a codebook"):
            getattr(dist, name)


def test_wrong_size(vae):
    """An image that f does not divide is one line, as from the model itself."""
    with pytest.raises(ValueError, match="image size 18x24 is not divisible by 4"):
        vae.encode(random_images(1, 18))


# ---- diffusers' own code, unmodified -----------------------------------------------------------------------


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=10, clip_sample=False)


def transformer() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    net = DiTTransformer2DModel(2, 8, in_channels=4, out_channels=4, num_layers=1, norm_num_groups=4,
                                sample_size=8, num_embeds_ada_norm=5)
    for parameter in net.parameters():                     # its last layer starts at 0
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net.eval()                                      # training mode drops labels at random


@torch.no_grad()
def denoise(predict, batch: int, seed: int) -> torch.Tensor:
    """DDIM's three steps from noise, written out: the latents that a pipeline hands to its vae."""
    ddim, z = scheduler(), torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    ddim.set_timesteps(3)
    for t in ddim.timesteps:
        z = ddim.step(predict(z, t), t, z).prev_sample
    return z


def assert_decoded(images: torch.Tensor, latents: torch.Tensor, vae: PretrainedAutoencoder) -> None:
    """The pipeline's images in [0, 1] are those of the model itself, and neither black nor white."""
    expected = (vae.model.decode(latents / LATENTS["scaling_factor"]) / 2 + 0.5).clamp(0, 1)
    assert images.shape == expected.shape and (images - expected).abs().max() < 1e-5
    assert images.std() > 0.01


def test_dit_pipeline(vae):
    """DiTPipeline with our model as its vae draws what our model decodes."""
    net, labels = transformer(), torch.tensor([1, 3])
    pipe = DiTPipeline(net, vae, scheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1, 3], guidance_scale=1, generator=torch.manual_seed(5), num_inference_steps=3,
                  output_type="pt").images  # fmt: skip
    latents = denoise(lambda z, t: net(z, timestep=t.expand(2), class_labels=labels).sample, 2, 5)
    assert_decoded(images, latents, vae)


def test_ldm_pipeline(vae):
    """So does LDMPipeline, the unconditional one, moved and saved as pipelines are."""
    torch.manual_seed(0)
    net = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
                      block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2,
                      up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    pipe = LDMPipeline(vae, net, scheduler()).to("cpu", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, generator=torch.manual_seed(5), num_inference_steps=3, output_type="np").images
    latents = denoise(lambda z, t: net(z, t).sample, 2, 5)
    assert_decoded(torch.from_numpy(images).movedim(-1, 1), latents, vae)


def test_pipeline_folder(vae, tmp_path):
    """A pipeline saves its other parts; given our vae, its folder loads again."""
    DiTPipeline(transformer(), vae, scheduler()).save_pretrained(tmp_path)
    vae.save_pretrained(tmp_path / "vae")
    ours = PretrainedAutoencoder.from_pretrained(tmp_path, subfolder="vae")
    pipe = DiTPipeline.from_pretrained(tmp_path, vae=ours)
    assert pipe.vae is ours and equal(dict(pipe.transformer.state_dict()), dict(transformer().state_dict()))


@torch.no_grad()
def test_image_to_image(vae):
    """The first and last lines of image-to-image pipelines: VaeImageProcessor, retrieve_latents, decode."""
    processor = VaeImageProcessor(vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1))
    x = processor.preprocess(Image.linear_gradient("L").convert("RGB").resize((35, 30)))
    assert x.shape == (1, 3, 28, 32)                       # multiples of 4
    encoded = vae.encode(x)
    z = retrieve_latents(encoded, torch.manual_seed(2))
    assert torch.equal(retrieve_latents(encoded, sample_mode="argmax"), vae.model.encode(x).mean)
    noise = torch.randn(z.shape, generator=torch.manual_seed(2))
    assert torch.equal(z, vae.model.encode(x).sample(noise))
    picture = processor.postprocess(vae.decode(z, return_dict=False)[0])[0]
    assert picture.size == (32, 28) and picture.mode == "RGB"


def test_training_step(vae):
    """As training scripts do it: encode, sample, scale, add noise, and the transformer alone learns."""
    net, noise_scheduler, x = transformer(), scheduler(), random_images(2, 32, 32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    latents = vae.encode(x.to(vae.dtype)).latent_dist.sample(torch.manual_seed(0))
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    noise, t = torch.randn_like(latents), torch.tensor([2, 7])
    losses = []
    for _ in range(5):
        noisy = noise_scheduler.add_noise(latents, noise, t)
        loss = (net(noisy, timestep=t, class_labels=torch.tensor([0, 1])).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(parameter.grad is None for parameter in vae.parameters())
