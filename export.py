"""Export a checkpoint: a folder with safetensors for Python, or ONNX files for everything else.

    python export.py out/demo/ckpt.pt --out shared/demo                   # config.json, model.safetensors
    python export.py out/demo/ckpt.pt --out shared/demo --format onnx     # encoder.onnx, decoder.onnx
    python export.py out/demo/ckpt.pt --out shared/demo --format half     # half.pt

downstream/pretrained.py reads the folder. The ONNX files take any batch, and images of any size that f
divides (with a ViT aggregator, only of its own size). They include the wavelet transforms, and plain
convolutions in place of self-modulated ones. They are compared with the model before they are written.
half.pt is a checkpoint of half the size, for eval.py and checkpoint.load_model: one set of weights, in fp16.

B batch, C channels, H W pixels, Z latent channels, f downsample factor, h w = H/f, W/f.
"""

import copy
import importlib
import importlib.util
import io
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from checkpoint import inference_state, load
from downstream.pretrained import CONFIG, WEIGHTS, PretrainedAutoencoder, check_free, write_files
from model import Autoencoder, Posterior, count_parameters
from runtime import cli
from variants.config import AutoencoderConfig
from variants.quantize import Quantized
from wavelets import full_precision

FILES = {"folder": (CONFIG, WEIGHTS), "onnx": ("encoder.onnx", "decoder.onnx"), "half": ("half.pt",)}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CHECKED = ((1, 8, 8), (2, 8, 12), (1, 12, 4))    # batch and latent sides that are compared
TOLERANCE = 1e-4                                 # largest difference, relative to values above 1


def parse_args(argv: list[str] | None = None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="checkpoint of train.py")
    add("--out", required=True, metavar="FOLDER", help="where to write; created if missing")
    add("--format", choices=tuple(FILES), default="folder",
        help="folder: config.json and model.safetensors; onnx: encoder.onnx and decoder.onnx; half: half.pt")
    add("--raw", action="store_true", help="the raw weights, not the averaged ones")
    add("--force", action="store_true", help="overwrite files that exist")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------
# the parts of the model as graphs from one input to named outputs


class OnnxEncoder(nn.Module):
    """images (B, C, H, W) -> latent_mean and latent_logvar, each (B, Z, h, w)."""

    outputs = ("latent_mean", "latent_logvar")   # a bare "mean" would clash with operations of that name

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.encode(images))


class OnnxCodebookEncoder(OnnxEncoder):
    """images (B, C, H, W) -> latent_mean (B, Z, h, w), nearest entries; latent_indices (B, h, w) int64.

    Like VectorQuantizer, but with all distances at once: a graph of any batch cannot split them into parts.
    """

    outputs = ("latent_mean", "latent_indices")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        z = full_precision(self.model.quant_conv(self.model.encoder(images)))
        codebook = self.model.quantizer.codebook
        half = codebook.double().square().sum(dim=1) / 2
        indices = (half - z.movedim(1, -1).double() @ codebook.double().mT).argmin(dim=-1)
        return F.embedding(indices, codebook).movedim(-1, 1), indices


class OnnxDecoder(nn.Module):
    """latents (B, Z, h, w) -> images (B, C, H, W), not clamped."""

    outputs = ("images",)

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return (self.model.decode(latents),)


# ------------------------------------------------------------------------------------------------------------
# exporting to ONNX, and comparing the files with the model


def check_packages() -> None:
    """Raise ValueError with the packages that ONNX needs and that are not installed."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--format onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def export_onnx(vae: PretrainedAutoencoder) -> dict[str, bytes]:
    """encoder.onnx and decoder.onnx by name; each has the content of config.json in its metadata."""
    config, folded = vae.model.config, copy.deepcopy(vae.model).fold_smc()
    encoder = (OnnxCodebookEncoder if config.codebook_size else OnnxEncoder)(folded)
    f, batch, h, w = config.downsample_factor, Dim("batch"), Dim("height"), Dim("width")
    sides = {} if config.resolution else {2: f * h, 3: f * w}
    traced = (
        trace(encoder, random_images(config, 2, 8, 12), {0: batch} | sides),
        trace(OnnxDecoder(folded), random_latents(config, 2, 8, 12), {0: batch, 2: h, 3: w}),
    )
    for program in traced:
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()               # stack traces, with the paths of this machine
        program.model.metadata_props.update({key: json.dumps(value) for key, value in vae.about().items()})
    return {name: program.model_proto.SerializeToString()
            for name, program in zip(FILES["onnx"], traced, strict=True)}


def trace(part: nn.Module, example: Tensor, dynamic: dict[int, Dim]) -> torch.onnx.ONNXProgram:
    """Trace a part with these dimensions of its input left open."""
    return torch.onnx.export(part.eval(), (example,), output_names=part.outputs, dynamic_shapes=(dynamic,),
                             dynamo=True, verbose=False)


@torch.no_grad()
def largest_difference(model: Autoencoder, files: dict[str, bytes]) -> float:
    """Between the model and the files in onnxruntime, over all sizes of CHECKED."""
    # an optional package; export and comparison need it, the folder does not
    onnxruntime = importlib.import_module("onnxruntime")
    encode, decode = (onnxruntime.InferenceSession(files[name]) for name in FILES["onnx"])
    found = []
    for size in CHECKED:
        x, z = random_images(model.config, *size), random_latents(model.config, *size)
        encoded, (decoded,) = run(encode, x), run(decode, z)
        found += [*encoder_differences(model.encode(x), *encoded), difference(model.decode(z), decoded)]
    return torch.tensor(found).max().item()                # nan if one of them is


def run(session, x: Tensor) -> list[Tensor]:
    return [torch.from_numpy(array) for array in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def encoder_differences(posterior: Posterior | Quantized, mean: Tensor, other: Tensor) -> list[float]:
    """With a codebook, how much farther the chosen entries are than the nearest: two may be equally near."""
    if isinstance(posterior, Posterior):
        return [difference(posterior.mean, mean), difference(posterior.logvar, other)]
    farther = (posterior.z - mean).norm(dim=1) - (posterior.z - posterior.mean).norm(dim=1)
    return [farther.max().item()]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference, relative where ours is above 1."""
    return ((ours - theirs).abs() / ours.abs().clamp(min=1)).max().item()


def random_images(config: AutoencoderConfig, batch: int, h: int, w: int) -> Tensor:
    """(batch, C, f h, f w) in [-1, 1]; always of the one size that a ViT takes."""
    f, side = config.downsample_factor, config.resolution
    shape = (batch, config.in_channels, side or f * h, side or f * w)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def random_latents(config: AutoencoderConfig, batch: int, h: int, w: int) -> Tensor:
    """(batch, Z, h, w), standard normal."""
    return torch.randn(batch, config.latent_channels, h, w, generator=torch.Generator().manual_seed(1))


def half(path: str, raw: bool) -> bytes:
    """An inference file with weights in fp16; loading it widens them to fp32."""
    buffer = io.BytesIO()
    torch.save(inference_state(load(path), raw, torch.float16), buffer)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------


def describe(vae: PretrainedAutoencoder) -> str:
    origin = vae.origin
    return f"{origin['weights']} weights of step {origin['step']}, {count_parameters(vae):,} parameters"


def main() -> None:
    args = parse_args()
    folder, names = Path(args.out), FILES[args.format]
    with cli.user_errors():
        if not args.force:
            check_free(folder, names)
        if args.format == "onnx":
            check_packages()
        vae = PretrainedAutoencoder.from_checkpoint(args.checkpoint, args.raw)
        if vae.latents is None:
            print(f"note: {args.checkpoint} has no statistics of its latents, so scaling_factor is 1 and "
                  f"shift_factor 0; python latents.py stats {args.checkpoint} --data SRC measures them")
        if args.format == "folder":
            vae.save_pretrained(folder, args.force)
        elif args.format == "half":
            write_files(folder, {"half.pt": half(args.checkpoint, args.raw)}, args.force)
        else:
            files = export_onnx(vae)
            found = largest_difference(vae.model, files)
            print(f"largest difference from the model in onnxruntime: {found:.1e}")
            if not found <= TOLERANCE:
                raise ValueError(f"the ONNX files would differ from the model by more than {TOLERANCE:g}")
            write_files(folder, files, args.force)
        print(f"wrote {' and '.join(str(folder / name) for name in names)}: {describe(vae)}")


if __name__ == "__main__":
    main()
