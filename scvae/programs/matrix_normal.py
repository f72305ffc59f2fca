r"""Images with latent maps in the place of a latent vector, so that what lies where is not lost.

Generative process, for the image of each cell (covariates :math:`s` as in the other programs), with
:math:`k = 1, \dots, N` and entries :math:`i, j` of a map of :math:`d_1` rows and :math:`d_2` columns:

.. math::
    F_{kij} &\sim \mathcal N(0, 1) \\
    x &\sim p(x \mid a(F, s))

:math:`a` is a network of transposed convolutions, each of which doubles height and width; the last line is one of the
likelihoods of :class:`~scvae.modules.pixels.Pixels`.

Guide, :math:`q(F \mid x, s) = \prod_k q(F_k \mid x, s)`, by a network of convolutions, each of which halves height and
width:

.. math::
    F_k &\sim \mathcal{MN}_{d_1, d_2}(M_k, \Omega_k \otimes \Psi_k)
    \quad\text{that is,}\quad F_k = M_k + \Omega_k^{1/2} E \, \Psi_k^{1/2}, \; E_{ij} \sim \mathcal N(0, 1)

with :math:`\Omega_k`, variances of rows, and :math:`\Psi_k`, of columns, diagonal. It takes :math:`(d_1 d_2 + d_1 +
d_2) N` numbers; with :math:`M_k = \mu_k \nu_k^\top` (``posterior="low_rank"``) :math:`2 (d_1 + d_2) N`; and
:math:`2 d_1 d_2 N` where each entry has a scale of its own (``posterior="normal"``).

References
----------
Wang, Yuan and Ji 2017, Spatial Variational Auto-Encoding via Matrix-Variate Normal Distributions, arXiv:1705.06821,
section 3. (Their code takes means of both terms of the bound and not sums, which gives the KL a weight of about 21.)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from scvae.boundary.options import Whole
from scvae.data.cells import Batch, Cells, Schema
from scvae.distributions import MatrixNormal
from scvae.modules.pixels import Pixels, kind_of_pixels
from scvae.programs.options import NetworkOptions
from scvae.programs.program import Program

__all__ = ["MatrixNormalVAE"]


class MatrixNormalVAE(Program):
    """The spatial VAE of latent maps.

    Parameters
    ----------
    schema
        The images and covariates of the data.
    **options
        Those of :class:`MatrixNormalVAE.Options`.

    Raises
    ------
    ValueError
        If the images are too small to be halved so often, or an option is none of those named.
    """

    name = "matrix_normal"
    of_images = True
    latent = "F"
    defaults = {
        "min_steps": 1500,
        "max_steps": 1500,
        "weight_decay": 0.3,
        "kl_warmup": 0.1,
        "kl_level": 1.0,
        "validation_fraction": 0.0,
    }

    @dataclass(frozen=True, kw_only=True)
    class Options(NetworkOptions):
        """Options of ``matrix_normal``.

        Parameters
        ----------
        n_latent
            Maps, ``N``. The embedding of a cell is all of them, row by row, ``N * d1 * d2`` numbers.
        n_hidden
            Channels of each convolution.
        n_layers
            Convolutions that halve height and width, odd ones rounded up: with 3, images of 28 x 28 pixels have maps
            of 4 x 4.
        pixels
            Likelihood of a pixel, ``"bernoulli"`` (values from 0 to 1), ``"gaussian"``, ``"poisson"`` or ``"nb"``
            (counts).
        posterior
            ``"matrix_normal"``, ``"low_rank"`` or ``"normal"``, as above.
        encode_covariates, dropout_rate
            As in :class:`~scvae.programs.options.NetworkOptions`.
        """

        n_latent: Whole = 8
        n_hidden: Whole = 32
        n_layers: Whole = 3
        pixels: Literal["bernoulli", "gaussian", "poisson", "nb"] = "bernoulli"
        posterior: Literal["matrix_normal", "low_rank", "normal"] = "matrix_normal"

    def __init__(self, schema: Schema, **options: Any) -> None:
        o = self.Options(**options)
        super().__init__(schema, **o.as_dict())
        n_latent, n_hidden, n_layers, posterior = o.n_latent, o.n_hidden, o.n_layers, o.posterior
        n_channels, height, width = schema.channels
        if n_layers > (most := (max(height, width) - 1).bit_length()):
            raise ValueError(f"n_layers={n_layers}: images of {height} x {width} pixels can be halved {most} times.")
        self.posterior, self.n_maps = posterior, n_latent
        self.n_encoded = schema.n_covariates if o.encode_covariates else 0
        sizes = [(height, width)]
        for _ in range(n_layers):
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        self.d1, self.d2 = sizes[-1]

        self.pixels = Pixels(o.pixels, schema)
        self.encoder = _Encoder(n_channels, self.n_encoded, n_hidden, n_layers, o.dropout_rate)
        of_mean = self.d1 + self.d2 if posterior == "low_rank" else self.d1 * self.d2
        of_scale = self.d1 * self.d2 if posterior == "normal" else self.d1 + self.d2
        self.widths = [of_mean, of_scale]  # numbers of each map
        self.head = nn.Linear(n_hidden * self.d1 * self.d2, n_latent * sum(self.widths))
        self.decoder = _Decoder(n_latent, n_channels, schema.n_covariates, n_hidden, sizes[::-1])
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on a CPU
        self.register_buffer("zero", torch.zeros(n_latent, self.d1, self.d2), persistent=False)

    zero: Tensor

    @classmethod
    def kind_of(cls, options: Mapping[str, Any]) -> str:
        """Return what the likelihood of the pixels models."""
        return kind_of_pixels(options)

    def initialise(self, cells: Cells) -> None:
        """Start the decoder at the mean image."""
        self.decoder.start(self.pixels.start(cells))

    def decayed(self) -> list[Tensor]:
        """Return the weights by which the maps act."""
        return self.decoder.weights()

    def model(self, batch: Batch) -> None:
        """F -> x."""
        with pyro.plate("cells", len(batch)):
            F = pyro.sample("F", self.p_F())  # [n, N, d1, d2]
            a = self.decoder(F, batch.covariates)
            pyro.sample("x", self.pixels(a), obs=None if batch.counts is None else batch.values)  # [n, C * H * W]

    def guide(self, batch: Batch) -> None:
        """x -> F."""
        with pyro.plate("cells", len(batch)):
            pyro.sample("F", self.q_F(batch))  # [n, N, d1, d2]

    def p_F(self) -> TorchDistribution:
        """Return the prior, in the guise in which its divergence from the posterior has a closed form."""
        one = self.zero + 1
        if self.posterior == "normal":
            return Normal(self.zero, one).to_event(3)
        return MatrixNormal(self.zero, row_scale=one[:, :, 0], col_scale=one[:, 0]).to_event(1)

    def q_F(self, batch: Batch) -> TorchDistribution:
        """Return the posterior of all maps."""
        loc, scale = self.encode(batch)
        if self.posterior == "normal":
            return Normal(loc, _positive(scale).view_as(loc)).to_event(3)
        row, col = _positive(scale).split([self.d1, self.d2], -1)  # [n, N, d1], [n, N, d2]
        return MatrixNormal(loc, row_scale=row, col_scale=col).to_event(1)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the means of the maps, ``[n, N, d1, d2]``, and what the encoder says of their scales."""
        images = self.pixels.inputs(batch.values).unflatten(2, self.schema.channels[1:])  # [n, C, H, W]
        h = self.encoder(images, batch.covariates[:, : self.n_encoded])
        loc, scale = self.head(h.flatten(1)).view(len(h), self.n_maps, -1).split(self.widths, -1)
        if self.posterior == "low_rank":
            mu, nu = loc.split([self.d1, self.d2], -1)
            return mu.unsqueeze(-1) * nu.unsqueeze(-2), scale
        return loc.unflatten(-1, (self.d1, self.d2)), scale

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of ``q(F | x)``, each ``[n, N * d1 * d2]``."""
        q = self.q_F(batch)
        return q.mean.flatten(1), q.variance.sqrt().flatten(1)

    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        """Return the expected pixels, ``[n, C * H * W]``, of maps, ``[n, N, d1, d2]`` or ``[n, N * d1 * d2]``."""
        F = z.reshape(-1, *self.zero.shape)
        return self.pixels.expected(self.decoder(F, batch.covariates)).flatten(1)


class _Encoder(nn.Module):
    """Convolutions that each halve an image; ``[n, C, H, W]`` to ``[n, n_hidden, d1, d2]``."""

    def __init__(self, n_channels: int, n_covariates: int, n_hidden: int, n_layers: int, dropout_rate: float) -> None:
        super().__init__()
        widths = [n_channels] + [n_hidden] * n_layers
        self.layers = nn.ModuleList(
            _Layer(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), n_covariates, b, dropout_rate)
            for a, b in itertools.pairwise(widths)
        )
        self.mix = _Layer(nn.Conv2d(n_hidden, n_hidden, 3, padding=1, bias=False), n_covariates, n_hidden, dropout_rate)

    def forward(self, x: Tensor, covariates: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            x = layer(x, covariates)
        return x + self.mix(x, covariates)


class _Decoder(nn.Module):
    """A linear layer of all maps, then transposed convolutions; ``[n, N, d1, d2]`` to ``[n, C, H * W]``.

    The linear layer lets each pixel depend on all entries of the maps, and each entry have a meaning of its own:
    without it, the entries at all places of a map have to be of use alike, and there are not so many things to say.

    Parameters
    ----------
    n_maps, n_channels, n_covariates, n_hidden
        ``N``, ``C``, the covariates, and the channels of the hidden layers.
    sizes
        Height and width after each layer, from those of a map to those of the image.
    """

    def __init__(
        self, n_maps: int, n_channels: int, n_covariates: int, n_hidden: int, sizes: list[tuple[int, int]]
    ) -> None:
        super().__init__()
        (d1, d2), *_, (height, width) = sizes
        linear = nn.Linear(n_maps * d1 * d2, n_hidden * d1 * d2, bias=False)
        spread = nn.Sequential(nn.Flatten(), linear, nn.Unflatten(1, (n_hidden, d1, d2)))
        doubling = [_doubling(n_hidden, n_hidden, size) for size in sizes[1:-1]]
        self.first = _Layer(spread, n_covariates, n_hidden)
        self.mix = _Layer(nn.Conv2d(n_hidden, n_hidden, 3, padding=1, bias=False), n_covariates, n_hidden)
        self.layers = nn.ModuleList(_Layer(layer, n_covariates, n_hidden) for layer in doubling)
        self.last = _doubling(n_hidden, n_channels, (height, width))
        self.of_covariates = nn.Parameter(torch.zeros(n_covariates, n_channels)) if n_covariates else None
        self.offset = nn.Parameter(torch.zeros(n_channels, height * width))

    @torch.no_grad()
    def start(self, offset: Tensor) -> None:
        """Start near an image, ``[C, H * W]``."""
        self.last.weight.mul_(0.3)
        self.offset.copy_(offset)

    def forward(self, F: Tensor, covariates: Tensor) -> Tensor:
        h = self.first(F, covariates)
        h = h + self.mix(h, covariates)
        for layer in self.layers:
            h = layer(h, covariates)
        a = self.last(h).flatten(2) + self.offset
        return a if self.of_covariates is None else a + (covariates @ self.of_covariates).unsqueeze(-1)

    def weights(self) -> list[Tensor]:
        """Return the weights by which the maps act: not those of the covariates, nor offsets."""
        kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
        return [module.weight for module in self.modules() if isinstance(module, kinds)]


class _Layer(nn.Module):
    """``convolution, offset of each channel by the covariates, batch norm, SiLU, dropout``."""

    def __init__(self, main: nn.Module, n_covariates: int, n_out: int, dropout_rate: float = 0.0) -> None:
        super().__init__()
        self.main = main
        weight = torch.empty(n_covariates, n_out).uniform_(-1, 1) / max(1, n_covariates) ** 0.5
        self.covariates = nn.Parameter(weight) if n_covariates else None
        self.norm = nn.BatchNorm2d(n_out, eps=1e-3)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor, covariates: Tensor) -> Tensor:
        h = self.main(x)
        if self.covariates is not None:
            h = h + (covariates @ self.covariates)[:, :, None, None]
        return self.dropout(silu(self.norm(h)))


_MIN_SCALE = 0.03  # of rows and of columns: the standard deviation of an entry stays above a thousandth


def _doubling(n_in: int, n_out: int, size: tuple[int, int]) -> nn.ConvTranspose2d:
    """Return what doubles height and width, to `size`, which may be odd: the adjoint of the encoder's convolution."""
    even = 1 - size[0] % 2, 1 - size[1] % 2
    return nn.ConvTranspose2d(n_in, n_out, 3, stride=2, padding=1, output_padding=even, bias=False)


def _positive(x: Tensor) -> Tensor:
    return softplus(x) + _MIN_SCALE
