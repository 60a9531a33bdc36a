"""Sizes of every architecture, ours beside what was published: `python -m variants.sizes`."""

from dataclasses import asdict

import model
from model import GROUP
from variants.build import build
from variants.config import AutoencoderConfig, scale_config

SD_VAE = dict(encoder="sd", conv1x1=True, **GROUP)
OPEN = dict(encoder="open-litevae", decoder="open-litevae")
# fmt: off
PRESETS = {
    **{name: AutoencoderConfig(**asdict(config)) for name, config in model.PRESETS.items()},
    "litevae-b-nafnet":   scale_config("B", extractor="nafnet", **GROUP),                        # D.3
    "litevae-b-shared":   scale_config("B", shared_extractor=True, latent_channels=4, **GROUP),  # D.4
    "litevae-b-vit":      scale_config("B", aggregator="vit", resolution=256, **GROUP),          # D.5
    "litevae-b-last2":    scale_config("B", first_level=2, latent_channels=4, **GROUP),          # D.6
    "litevae-l-conv":     scale_config("L", downsample="conv", latent_channels=4, **GROUP),      # Table 3
    "dwt":                AutoencoderConfig(encoder="dwt", **GROUP),                             # App. B
    "dwt2":               AutoencoderConfig(encoder="dwt2", latent_channels=48, **GROUP),
    "vae-nz12":           AutoencoderConfig(encoder="sd", **GROUP),
    "open-litevae-s":     scale_config("S", extractor_blocks=3, aggregator_blocks=3, **OPEN),
    "open-litevae-b":     scale_config("B", extractor_blocks=4, aggregator_blocks=4, **OPEN),
    "open-litevae-m":     scale_config("M", extractor_blocks=5, aggregator_blocks=4, **OPEN),
    "open-litevae-l":     scale_config("L", extractor_blocks=5, aggregator_blocks=4, **OPEN),
    "sd-vae":             AutoencoderConfig(latent_channels=4, **SD_VAE),
    "sd-kl-f4":           AutoencoderConfig(latent_channels=3, levels=2, **SD_VAE),
    "transfusion-f8d8":   AutoencoderConfig(latent_channels=8, **SD_VAE),
    "vq-f8":              AutoencoderConfig(latent_channels=4, codebook_size=16_384, **SD_VAE),
    "vq-f4":              AutoencoderConfig(latent_channels=3, levels=2, codebook_size=8_192, **SD_VAE),
}
# fmt: on

# as published: millions of parameters and 1e9 MACs, encoder or encoder/decoder. LiteVAE's Tables 2a and 3
# count at n_z 4; open-LiteVAE's README, of S and B without group norms. Both say FLOPs and mean MACs
PUBLISHED = model.PUBLISHED | {
    "litevae-l-conv": ("41.425", "-"),
    "sd-vae": ("34.16", "135.59"),
    "open-litevae-s": ("0.97/53.33", "5.5/324"), "open-litevae-b": ("6.60/53.33", "37.4/324"),
    "open-litevae-m": ("34.00/53.33", "234.9/324"), "open-litevae-l": ("41.15/53.33", "242.1/324"),
}  # fmt: skip


def table() -> str:
    return model.table(PRESETS, PUBLISHED, build)


if __name__ == "__main__":
    print(table())
