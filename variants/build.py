"""The doors to this folder: `build` makes the model of any configuration, `build_discriminator` any judge.

train.py, eval.py and checkpoint.py need nothing else to train, score and load every system.
"""

from dataclasses import fields
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import discriminators
from model import (
    Autoencoder,
    Decoder,
    LiteVAEConfig,
    Posterior,
    ResBlock,
    UNet,
    Upsample,
    init_encoder,
    init_smc_decoder,
)
from variants.ablations import AblatedEncoder, NAFBlock, ViTAggregator, ViTBlock, WaveletEncoder
from variants.config import AutoencoderConfig
from variants.gigagan import GigaGANDiscriminator
from variants.openlitevae import OpenLiteVAEDecoder, OpenLiteVAEEncoder, PostNormBlock
from variants.quantize import Quantized, VectorQuantizer
from variants.sdvae import SDEncoder
from variants.stylegan import StyleGANDiscriminator
from wavelets import full_precision

# ----------------------------------------------------------------------------
# autoencoders


def build(config: LiteVAEConfig) -> Autoencoder:
    """The autoencoder of a configuration: LiteVAE's own class if every part is LiteVAE's."""
    return Autoencoder(config) if is_litevae(config) else VariantAutoencoder(config)


def is_litevae(config: LiteVAEConfig) -> bool:
    own = {field.name for field in fields(LiteVAEConfig)}
    return all(getattr(config, field.name) == field.default
               for field in fields(config) if field.name not in own)


class VariantAutoencoder(Autoencoder):
    """The parts that a configuration names, 1x1 convolutions around the latent, Gaussian or codebook."""

    config: AutoencoderConfig

    def make_parts(self) -> None:
        config, moments = self.config, self.config.moment_channels
        nz, conv1x1 = config.latent_channels, config.conv1x1
        self.encoder = build_encoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if conv1x1 else nn.Identity()
        self.post_quant_conv = nn.Conv2d(nz, nz, 1) if conv1x1 else nn.Identity()
        self.decoder = Decoder(config) if config.decoder == "sd" else OpenLiteVAEDecoder(config)
        self.quantizer = None
        if config.codebook_size:
            self.quantizer = VectorQuantizer(config.codebook_size, nz, config.codebook_update)

    def init_weights(self) -> None:
        """LiteVAE's encoder and SMC decoders as in model.py, with their exchanged parts; else torch's."""
        if self.config.initialisation == "torch":
            return
        if isinstance(self.encoder, AblatedEncoder):
            unets, blocks = (UNet, ViTAggregator), (ResBlock, NAFBlock)
            init_encoder(self.encoder, self.config.latent_channels, unets, blocks)
        if self.config.decoder_norm == "smc":
            init_smc_decoder(self.decoder, self.config, (ResBlock, PostNormBlock))

    def encode(self, x: Tensor) -> Posterior | Quantized:
        """As in Autoencoder. With a codebook the posterior's mean and all its samples are nearest entries."""
        self.check_size(x)
        moments = full_precision(self.quant_conv(self.encoder(x)))
        return self.quantizer(moments) if self.quantizer is not None else Posterior.of(moments)

    def check_size(self, x: Tensor) -> None:
        """ValueError on sides that are no multiples of f, or not the one size that a ViT takes."""
        super().check_size(x)
        side = self.config.resolution
        if side and x.shape[-2:] != (side, side):
            raise ValueError(
                f"image size {x.shape[-2]}x{x.shape[-1]}: this model has a ViT aggregator, which takes only "
                f"{side}x{side}: crop or resize to that, or train with aggregator=unet"
            )

    def features(self, z: Tensor) -> Tensor:
        return self.decoder.features(self.post_quant_conv(z))


def build_encoder(config: AutoencoderConfig) -> nn.Module:
    """x (B, C, H, W) -> moments (B, 2Z, h, w), or (B, Z, h, w) with a codebook."""
    if config.encoder in ("dwt", "dwt2"):
        return WaveletEncoder(config.levels, config.wavelet, details=config.encoder == "dwt2")
    kinds = {"litevae": AblatedEncoder, "sd": SDEncoder, "open-litevae": OpenLiteVAEEncoder}
    return kinds[config.encoder](config)


BLOCKS = (ResBlock, Upsample, PostNormBlock, NAFBlock, ViTBlock)


def recompute_blocks(model: Autoencoder) -> None:
    """Gradient checkpointing: a block keeps only its input, and the backward pass runs the block again."""
    for block in filter(lambda module: isinstance(module, BLOCKS), model.modules()):
        random = getattr(block, "dropout", 0) > 0             # else there is no state to restore
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=random)


# ----------------------------------------------------------------------------
# discriminators

# name -> function of (channels, side) of the training images
DISCRIMINATORS = {
    **discriminators.DISCRIMINATORS,
    "stylegan": StyleGANDiscriminator,
    "gigagan": lambda in_channels, res: GigaGANDiscriminator(in_channels),
}


def build_discriminator(name: str, in_channels: int, res: int) -> nn.Module:
    """A discriminator by name for images of res x res; ValueError if it takes no such images."""
    disc = DISCRIMINATORS[name](in_channels, res)
    discriminators.check_size(disc, res, res)
    return disc
