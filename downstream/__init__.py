"""What users of a trained model import: tiles, the data set of latents, pictures, diffusers' interface."""
