"""One configuration for every system and ablation: LiteVAE's, extended.

Each field beyond LiteVAE's names a part of another system or of one of the paper's ablations. A default means
LiteVAE's own part, so that every LiteVAE is a configuration of this class, too. Checks of one field stand
first, checks of fields that have to go together after them.
"""

from dataclasses import dataclass

from model import LiteVAEConfig, check_choice, scale_fields

OPEN_GROUPS = 8    # of every group norm of open-LiteVAE

LITEVAE_ONLY = {   # fields that only encoder="litevae" reads, with their value elsewhere
    "extractor": "unet", "shared_extractor": False, "first_level": 1, "downsample": "pool",
    "aggregator": "unet", "dropout": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class AutoencoderConfig(LiteVAEConfig):
    """Everything that fixes an architecture. Plain values only: the configuration is part of a checkpoint."""

    encoder: str = "litevae"                   # "litevae" (wavelets and UNets), "sd" (the KL-f8 pyramid),
                                               # "dwt" or "dwt2" (the wavelet bands themselves, App. B),
                                               # or "open-litevae", see openlitevae.py
    extractor_blocks: int = 2                  # ResBlocks per width: 2 (App. G), 3 to 5 in open-LiteVAE
    aggregator_blocks: int = 2
    sd_channels: int = 128                     # width of the "sd" encoder
    decoder: str = "sd"                        # "sd" (model.Decoder) or "open-litevae"
    conv1x1: bool = False                      # 1x1 convs around the latent; Table 17: they hurt
    extractor: str = "unet"                    # blocks of the extractors: "unet", or "nafnet" (D.3)
    shared_extractor: bool = False             # one extractor for all levels (D.4)
    first_level: int = 1                       # finer levels are left out; D.6, "the last two": 2
    downsample: str = "pool"                   # of the extractors' outputs: "pool", or "conv", learned
    aggregator: str = "unet"                   # "unet", or "vit" (D.5)
    resolution: int = 0                        # side of the images that a ViT is bound to, pixels
    dropout: float = 0.0                       # in the blocks of extractors and aggregator
    codebook_size: int = 0                     # entries of VQ-GAN's codebook; 0 is the Gaussian posterior
    codebook_update: str = "gradient"          # or "ema", a moving average of the encoder's outputs
    initialisation: str = "isometry"           # Autoencoder.init_weights, or "torch", its defaults

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("encoder", self.encoder, ("litevae", "sd", "dwt", "dwt2", "open-litevae"))
        check_choice("decoder", self.decoder, ("sd", "open-litevae"))
        check_choice("extractor", self.extractor, ("unet", "nafnet"))
        check_choice("first_level", self.first_level, tuple(range(1, self.levels + 1)))
        check_choice("downsample", self.downsample, ("pool", "conv"))
        check_choice("aggregator", self.aggregator, ("unet", "vit"))
        check_choice("codebook_update", self.codebook_update, ("gradient", "ema"))
        check_choice("initialisation", self.initialisation, ("isometry", "torch"))
        check_ranges(self)
        check_encoder(self)
        check_latent(self)
        check_initialisation(self)
        check_open_litevae(self)

    @property
    def moment_channels(self) -> int:
        """Channels of the encoder's output: mean and log-variance, or with a codebook the code alone."""
        return self.latent_channels * (1 if self.codebook_size else 2)


def scale_config(scale: str, **options) -> AutoencoderConfig:
    """The configuration of a paper scale, S, B, M or L; options override any field."""
    return AutoencoderConfig(**scale_fields(scale) | options)


# ----------------------------------------------------------------------------
# checks; each raises ValueError with the value received


def check_ranges(config: AutoencoderConfig) -> None:
    if config.sd_channels < 1:
        raise ValueError(f"sd_channels must be at least 1, got {config.sd_channels}")
    if config.codebook_size < 0 or config.codebook_size == 1:
        raise ValueError(f"codebook_size must be 0 (no codebook) or at least 2, got {config.codebook_size}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {config.dropout}")
    if config.resolution < 0 or config.resolution % config.downsample_factor:
        raise ValueError(
            f"resolution must be a multiple of {config.downsample_factor}, got {config.resolution}"
        )


def check_encoder(config: AutoencoderConfig) -> None:
    for name, default in LITEVAE_ONLY.items():
        if config.encoder != "litevae" and getattr(config, name) != default:
            raise ValueError(f"{name}={getattr(config, name)} needs encoder=litevae, got {config.encoder}")
    idle = config.encoder == "open-litevae" or config.encoder == "sd" and config.output == "image"
    if config.wavelet != "haar" and idle:
        where = f"encoder={config.encoder} and output={config.output}"
        raise ValueError(f"wavelet={config.wavelet} has nothing to act on: {where}")
    if config.first_level == config.levels and (config.shared_extractor or config.downsample == "conv"):
        name = "shared_extractor" if config.shared_extractor else "downsample=conv"
        raise ValueError(f"{name} has nothing to act on: first_level={config.first_level} leaves one level")
    if (config.aggregator == "vit") != bool(config.resolution):
        raise ValueError(
            f"aggregator=vit and a resolution need each other, got aggregator={config.aggregator} and "
            f"resolution={config.resolution}: a ViT takes images of one size only"
        )


def check_latent(config: AutoencoderConfig) -> None:
    if config.codebook_update == "ema" and not config.codebook_size:
        raise ValueError("codebook_update=ema needs a codebook: set codebook_size, or leave it out")
    if config.encoder not in ("dwt", "dwt2"):
        return
    channels = config.in_channels * (4 if config.encoder == "dwt" else 16)
    if config.latent_channels != channels:
        raise ValueError(
            f"encoder={config.encoder} gives {channels} latent channels for {config.in_channels} of the "
            f"image, got latent_channels={config.latent_channels}: set it to {channels}"
        )
    if config.conv1x1 or config.codebook_size:
        name = "conv1x1" if config.conv1x1 else "codebook_size"
        raise ValueError(f"{name} belongs to a learned encoder, got encoder={config.encoder}")


def check_initialisation(config: AutoencoderConfig) -> None:
    if config.initialisation == "torch" and config.encoder != "litevae" and config.decoder_norm == "group":
        raise ValueError(
            f"initialisation=torch changes nothing: encoder={config.encoder} and decoder_norm=group "
            "start with torch's defaults anyway"
        )


def check_open_litevae(config: AutoencoderConfig) -> None:
    blocks = config.extractor_blocks, config.aggregator_blocks
    if min(blocks) < 1:
        raise ValueError(f"extractor_blocks and aggregator_blocks must be at least 1, got {blocks}")
    if config.encoder != "open-litevae" and blocks != (2, 2):
        raise ValueError(f"extractor_blocks and aggregator_blocks are 2 in {config.encoder}, got {blocks}")
    widths = [config.extractor_channels * m for m in config.extractor_mult]
    widths += [config.aggregator_channels * m for m in config.aggregator_mult]
    if config.encoder == "open-litevae" and any(width % OPEN_GROUPS for width in widths):
        raise ValueError(f"encoder=open-litevae needs widths that {OPEN_GROUPS} divides, got {widths}")
    options = config.decoder_norm, config.decoder_attention, config.output
    if config.decoder == "open-litevae" and options != ("smc", False, "image"):
        raise ValueError(
            "decoder=open-litevae is self-modulated, without attention, and gives images: it needs "
            "decoder_norm=smc, decoder_attention=False, output=image, got {}, {}, {}".format(*options)
        )
