"""From what a decoder says of each pixel to the distribution of an image; shared by the programs of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import Bernoulli, GammaPoisson, Normal, Poisson, constraints
from torch import Tensor, nn
from torch.nn.functional import softplus

from scvae.boundary.options import one_of
from scvae.data.cells import Cells, Schema

__all__ = ["PIXELS", "Pixels", "kind_of_pixels"]

#: Likelihoods of a pixel by name, and the kind of numbers that each wants.
PIXELS = {"bernoulli": "unit", "gaussian": "real", "poisson": "counts", "nb": "counts"}


def kind_of_pixels(options: Mapping[str, Any]) -> str:
    """Return the kind of numbers that a program of images with these options models.

    Raises
    ------
    ValueError
        If there is no such likelihood of pixels.
    """
    pixels = options.get("pixels", "bernoulli")
    one_of("pixels", pixels, tuple(PIXELS))
    return PIXELS[pixels]


class Pixels(nn.Module):
    r"""Pixels by one number :math:`a_i` each, independent given it.

    ``"bernoulli"``: :math:`y_i \sim \mathrm{Bernoulli}(\mathrm{sigmoid}\, a_i)`; values between 0 and 1 are taken as
    averages of many such pixels, as is usual for grey images. ``"gaussian"``: :math:`y_i \sim \mathcal N(m_c + t_c a_i,
    \sigma_c^2)`, with mean :math:`m_c` and standard deviation :math:`t_c` of channel :math:`c` in the data.
    ``"poisson"`` and ``"nb"``: counts with mean :math:`\exp a_i` and, for the second, an inverse dispersion
    :math:`\theta_c`.

    Parameters
    ----------
    pixels
        One of these four.
    schema
        Of the data, which says how large an image is.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, pixels: str, schema: Schema) -> None:
        super().__init__()
        one_of("pixels", pixels, tuple(PIXELS))
        self.pixels = pixels
        self.n_channels, *_ = schema.channels
        if pixels == "gaussian":
            self.raw_noise = nn.Parameter(torch.full((self.n_channels, 1), _NOISE_START))
            self.register_buffer("mean", torch.zeros(self.n_channels, 1))
            self.register_buffer("scale", torch.ones(self.n_channels, 1))
        if pixels == "nb":
            self.log_theta = nn.Parameter(torch.zeros(self.n_channels, 1))

    @torch.no_grad()
    def start(self, cells: Cells) -> Tensor:
        """Read mean and scale of the channels off the data; return the ``a`` of the mean image, ``[C, H * W]``."""
        mean, variance = (part.view(self.n_channels, -1) for part in cells.summary.moments())
        if self.pixels == "bernoulli":
            return mean.clamp(_LEAST, 1 - _LEAST).logit()
        if self.pixels != "gaussian":
            return mean.clamp(min=_LEAST).log()
        self.mean.copy_(mean.mean(1, keepdim=True))
        spread = (variance + (mean - self.mean) ** 2).mean(1, keepdim=True).sqrt()
        self.scale.copy_(torch.where(spread > 0, spread, 1.0))
        return (mean - self.mean) / self.scale

    def inputs(self, values: Tensor) -> Tensor:
        """Return images, ``[n, C * H * W]``, as a network takes them, about one in size, ``[n, C, H * W]``."""
        y = values.unflatten(1, (self.n_channels, -1))
        if self.pixels == "gaussian":
            return (y - self.mean) / self.scale
        return y if self.pixels == "bernoulli" else y.log1p()

    def forward(self, a: Tensor) -> Any:
        """Return the distribution of images, event ``[C * H * W]``, given ``a``, ``[..., C, H * W]``."""
        if self.pixels == "bernoulli":
            return _Grey(logits=a.flatten(-2)).to_event(1)
        if self.pixels == "gaussian":
            noise = self.scale * (softplus(self.raw_noise) + _LEAST)
            loc = self.mean + self.scale * a
            return Normal(loc.flatten(-2), noise.expand(a.shape[-2:]).flatten()).to_event(1)
        mean = a.clamp(max=_MOST).exp().flatten(-2)
        if self.pixels == "poisson":
            return Poisson(mean).to_event(1)
        theta = self.log_theta.exp().expand(a.shape[-2:]).flatten()
        return GammaPoisson(theta, theta / mean).to_event(1)

    def mass(self, a: Tensor) -> Tensor:
        """Return how much of an object there is at each pixel, ``[n, H * W]``, given ``a``, ``[n, C, H, W]``.

        It is the contrast: how much what is expected there differs from what is expected at the border of the image,
        be it brighter or darker; counts by their logarithms, as the encoder takes them. Where there is little contrast
        beside the largest of the image, its square counts, so that noise weighs next to nothing.
        """
        y = a if self.pixels == "gaussian" else a.sigmoid() if self.pixels == "bernoulli" else softplus(a)
        border = torch.cat([y[..., 0, :], y[..., -1, :], y[..., :, 0], y[..., :, -1]], -1).mean(-1)  # [n, C]
        contrast = (y - border[..., None, None]).abs()
        little = _LITTLE * contrast.amax((1, 2, 3), keepdim=True)
        return (contrast.square() / (contrast + little + _NOTHING)).sum(1).flatten(1)

    def expected(self, a: Tensor) -> Tensor:
        """Return the expected pixels, ``[n, C, ...]``, given ``a`` of the same shape."""
        if self.pixels == "bernoulli":
            return a.sigmoid()
        if self.pixels != "gaussian":
            return a.exp()
        of_channels = (-1, *[1] * (a.dim() - 2))
        return self.mean.view(of_channels) + self.scale.view(of_channels) * a


class _Grey(Bernoulli):
    """Bernoulli of which averages are taken as values too."""

    support = constraints.unit_interval

    def log_prob(self, value: Tensor) -> Tensor:
        return value * self.logits - softplus(self.logits)


_LITTLE = 0.3  # contrast, of the largest
_NOTHING = 1e-6
_LEAST = 1e-3  # of a mean pixel at the start, and of the noise in units of the channel's standard deviation
_MOST = 20.0  # of the log of a mean count
_NOISE_START = 0.5413  # softplus: 1, all that varies
