"""The frozen autoencoder: diffusers' AutoencoderKL with the scale and shift of the released FLUX.1 files."""

from pathlib import Path

import torch
from torch import Tensor, nn


class Autoencoder(nn.Module):
    def __init__(self, path: str | Path, dtype: torch.dtype) -> None:
        """path: folder of the released layout's `vae/` (config.json and safetensors)."""
        super().__init__()
        from diffusers import AutoencoderKL  # seconds to import

        options = {"torch_dtype": dtype, "local_files_only": True, "low_cpu_mem_usage": False}
        vae = AutoencoderKL.from_pretrained(path, **options)
        # Convolutions are faster on channels-last tensors, on GPUs and CPUs alike.
        self.vae = vae.to(memory_format=torch.channels_last).requires_grad_(False).eval()
        if getattr(self.vae.config, "shift_factor", None) is None:
            raise ValueError(f"{path}/config.json has no shift_factor: this is not a FLUX.1 autoencoder")
        self.scale = float(self.vae.config.scaling_factor)
        self.shift = float(self.vae.config.shift_factor)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images -> mean and standard deviation [B, C, H/f, W/f] float32 of the scaled latents."""
        mean, std = self.posterior(self.moments(images_B3HW)).unbind(1)
        return mean, std

    @torch.no_grad()
    def moments(self, images_B3HW: Tensor) -> Tensor:
        """uint8 images -> mean and log-variance [B, 2, C, H/f, W/f], as computed, before scale and shift."""
        images = images_B3HW.to(self.vae.device).to(self.vae.dtype) / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        return torch.stack([posterior.mean, posterior.logvar], dim=1)

    def posterior(self, moments_B2CHW: Tensor) -> Tensor:
        """`moments` -> mean and standard deviation [B, 2, C, H/f, W/f] float32 of the scaled latents."""
        mean, log_variance = moments_B2CHW.to(self.vae.device).unbind(1)
        std = torch.exp(0.5 * log_variance)
        return torch.stack([(mean.float() - self.shift) * self.scale, std.float() * self.scale], dim=1)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Scaled latents -> uint8 images [B, 3, H, W]."""
        images = self.vae.decode((latents_BCHW / self.scale + self.shift).to(self.vae.dtype)).sample
        return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
