"""Renderings: a flag as a photograph would show it. Scaled, shifted, turned, lit, blurred and noisy.

A rendering is drawn anew from the flag's raster each time, on the device, for a whole batch, so that training
never sees an image twice.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from errata.editor.atlas.flags import Flag, draw

SIDE = 96
"""Pixels on a side of a rendering. Atlas's processor halves it."""


def raster(flag: Flag) -> Float[Tensor, "3 64 96"]:
    """The flag itself, RGB in 0…1."""
    return torch.from_numpy(np.array(draw(flag))).permute(2, 0, 1).float() / 255


@lru_cache(maxsize=256)
def _cached_raster(flag: Flag) -> Tensor:
    return raster(flag)


def render(
    rasters: Float[Tensor, "n 3 64 96"], generator: torch.Generator, side: int = SIDE
) -> Float[Tensor, "n 3 side side"]:
    """One random rendering of each raster, RGB in 0…1.

    The flag fills 70–100 % of the width, is turned by up to 12°, sheared and shifted a little, stands before a
    plain or graded background, and the light, contrast, colour cast, blur and noise vary.
    """
    n = rasters.shape[0]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    angle = uniform(-0.21, 0.21)
    scale, stretch, shear = uniform(0.70, 1.0), uniform(0.9, 1.12), uniform(-0.12, 0.12)
    aspect = 2 / 3
    # affine_grid maps output coordinates to the raster's: the inverse of turning, shearing and scaling.
    cos, sin = torch.cos(angle), torch.sin(angle)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cos / scale, (sin + shear) / scale
    theta[:, 1, 0], theta[:, 1, 1] = -sin / (scale * aspect * stretch), cos / (scale * aspect * stretch)
    theta[:, :, 2] = uniform(-0.12, 0.12, 2)
    grid = F.affine_grid(theta, [n, 3, side, side], align_corners=False)
    flag = F.grid_sample(rasters, grid, padding_mode="border", align_corners=False)
    inside = (grid.abs() <= 1).all(-1, keepdim=True).permute(0, 3, 1, 2).float()

    ramp = torch.linspace(-1, 1, side)
    background = uniform(0.05, 0.95, 3, 1, 1) + uniform(-0.2, 0.2, 3, 1, 1) * ramp.view(1, 1, side, 1)
    image = flag * inside + background * (1 - inside)

    light = uniform(-0.15, 0.15, 1, 1, 1) * ramp.view(1, 1, 1, side) + uniform(0.75, 1.15, 1, 1, 1)
    cast = uniform(0.93, 1.07, 3, 1, 1)
    contrast = uniform(0.75, 1.15, 1, 1, 1)
    image = ((image - 0.5) * contrast + 0.5) * light * cast
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    image = torch.lerp(image, blurred, uniform(0.0, 1.0, 1, 1, 1))
    noise = torch.randn(image.shape, generator=generator) * uniform(0.0, 0.04, 1, 1, 1)
    return (image + noise).clamp(0, 1)


def renderings(flags: Sequence[Flag], seed: int) -> list[Image.Image]:
    """One rendering of each flag as RGB pictures; the same seed draws the same pictures."""
    generator = torch.Generator().manual_seed(seed)
    batch = render(torch.stack([_cached_raster(f) for f in flags]), generator)
    pixels = (batch * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(p) for p in pixels]
