"""Images under rotation and shift: coordinates, looking up, decoders that are functions of coordinates.

Coordinates run to the right (x) and downwards (y) from the centre of the image, in units of half of its longer side.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample, pad

from scvae.modules.nets import Layers, LinearWithCovariates

__all__ = ["CoordinateDecoder", "MapDecoder", "grid", "look_up", "to_object", "turned"]

Mass = Callable[[Tensor], Tensor]


def grid(height: int, width: int, unit: float | None = None, *, device: torch.device | None = None) -> Tensor:
    """Return the coordinates of the centres of the pixels, row by row, ``[height * width, 2]``.

    `unit` is the number of pixels that are one unit, by default half of the longer side.

    Examples
    --------
    >>> grid(2, 2).tolist()
    [[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]]
    """
    unit = max(height, width) / 2 if unit is None else unit
    x, y = ((torch.arange(n, device=device) - (n - 1) / 2) / unit for n in (width, height))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)


def turned(points: Tensor, angle: Tensor) -> Tensor:
    """Turn points, ``[..., 2]``, about the origin by angles, ``[...]``, in radians, from the x axis to the y axis.

    Examples
    --------
    >>> turned(torch.tensor([1.0, 0.0]), torch.tensor(torch.pi / 2)).round().tolist()
    [-0.0, 1.0]
    """
    cos, sin = angle.cos(), angle.sin()
    x, y = points.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1)


def to_object(theta: Tensor | None, delta: Tensor | None) -> Tensor | None:
    """Return the map from coordinates in the image to those of an object that is turned and shifted.

    Parameters
    ----------
    theta
        Angles, ``[...]``, radians; None: not turned.
    delta
        Shifts, ``[..., 2]``; None: not shifted.

    Returns
    -------
    Tensor
        Matrices ``A``, ``[..., 3, 2]``: a point ``[x, y, 1] @ A`` is ``R(-theta) ([x, y] - delta)``.
    """
    if theta is None and delta is None:
        return None
    theta = torch.zeros_like(delta[..., 0]) if theta is None else theta
    cos, sin = theta.cos(), theta.sin()
    matrix = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    offset = torch.zeros_like(matrix[..., :1, :]) if delta is None else -delta.unsqueeze(-2) @ matrix
    return torch.cat([matrix, offset], -2)


def look_up(images: Tensor, places: Tensor) -> Tensor:
    """Return what images, ``[N, C, H, W]``, show at places, ``[N, P, 2]``, as ``[N, C, P]``.

    Places run from -1 to 1 between the borders. Bilinearly between the centres of pixels; beyond the border, what
    there is at the border.
    """
    return grid_sample(images, places.unsqueeze(1), padding_mode="border", align_corners=False).squeeze(2)


class MapDecoder(nn.Module):
    """``z`` to an image of the object in a pose of its own, which is looked up where the pixels are, bilinearly.

    Parameters
    ----------
    n_latent, n_covariates
        Inputs.
    shape
        Channels, height and width of the images.
    margin
        Pixels by which the map is larger to each side, as the object may lie partly outside of the image.
    n_hidden, n_layers
        Width and number of the hidden layers.
    mass
        From ``a``, ``[n, C, H, W]``, to how much of the object is where, ``[n, H * W]``: its centre of mass is the
        origin of its coordinates. None: the middle of the map is.
    """

    halves: Tensor
    points: Tensor

    def __init__(
        self,
        n_latent: int,
        n_covariates: int,
        shape: tuple[int, int, int],
        margin: int,
        n_hidden: int,
        n_layers: int,
        mass: Mass | None,
    ) -> None:
        super().__init__()
        n_channels, height, width = shape
        self.margin, self.mass = margin, mass
        self.shape = (n_channels, height + 2 * margin, width + 2 * margin)
        self.layers = Layers(n_latent, n_covariates, n_hidden, n_layers)
        self.out = LinearWithCovariates(self.layers.n_out, n_covariates, math.prod(self.shape))
        halves = torch.tensor(self.shape[:0:-1]) / max(height, width)  # of width and height, in coordinates
        self.register_buffer("halves", halves, persistent=False)
        self.register_buffer("points", grid(*self.shape[1:], unit=max(height, width) / 2), persistent=False)

    @torch.no_grad()
    def start(self, a: Tensor) -> None:
        """Start at the mean image, ``[C, H * W]``, continued by its border."""
        n_channels, height, width = self.shape
        self.out.start()
        image = a.view(n_channels, height - 2 * self.margin, width - 2 * self.margin)
        self.out.main.bias.copy_(pad(image, [self.margin] * 4, mode="replicate").flatten())

    def forward(self, z: Tensor, covariates: Tensor, points: Tensor, pose: Tensor | None) -> Tensor:
        """Return ``a``, ``[..., n, C, P]``.

        Parameters
        ----------
        z
            ``[n, d]``.
        covariates
            ``[n, n_covariates]``.
        points
            Coordinates in the image, ``[P, 2]``.
        pose
            From these to coordinates of the object, ``[..., n, 3, 2]``, see :func:`to_object`; None: the same.
        """
        images = self.out(self.layers(z, covariates), covariates).view(-1, *self.shape)
        if self.mass is not None:
            pose = _about_centre(pose, self.mass(images), self.points)
        if pose is None:
            return look_up(images, (points / self.halves).expand(len(images), -1, -1))
        places = _moved(points, pose / self.halves)
        if places.dim() == 3:
            return look_up(images, places)
        seen = look_up(images, places.transpose(0, 1).flatten(1, 2))  # [n, C, K * P]
        return seen.unflatten(2, (len(places), -1)).permute(2, 0, 1, 3)

    def weights(self) -> list[Tensor]:
        """Return the weights by which ``z`` acts."""
        return [*self.layers.weights(), self.out.main.weight]


class CoordinateDecoder(nn.Module):
    """``z`` and the coordinates of a pixel to that pixel, by one network for all of them.

    Bepler, Zhong, Kelley, Brignole and Berger 2019, Explicitly disentangling image content from translation and
    rotation with spatial-VAE, NeurIPS, section 2.1.

    Parameters
    ----------
    n_latent, n_covariates
        Inputs beside the coordinates.
    shape
        Channels, height and width of the images.
    n_hidden, n_layers
        Width and number of the hidden layers, tanh.
    mass
        As of :class:`MapDecoder`; without it, the origin is any point of the object.
    """

    points: Tensor

    def __init__(
        self,
        n_latent: int,
        n_covariates: int,
        shape: tuple[int, int, int],
        n_hidden: int,
        n_layers: int,
        mass: Mass | None,
    ) -> None:
        super().__init__()
        n_channels, *self.size = shape
        self.mass = mass
        self.register_buffer("points", grid(*self.size), persistent=False)
        self.of_z = LinearWithCovariates(n_latent, n_covariates, n_hidden)
        self.of_points = nn.Parameter(_SHARPNESS * torch.randn(2, n_hidden))
        self.hidden = nn.ModuleList(nn.Linear(n_hidden, n_hidden) for _ in range(n_layers - 1))
        self.out = nn.Linear(n_hidden, n_channels)

    @torch.no_grad()
    def start(self, a: Tensor) -> None:
        """Start at the mean of each channel over the pixels of the mean image, ``[C, H * W]``."""
        self.out.bias.copy_(a.mean(1))

    def forward(self, z: Tensor, covariates: Tensor, points: Tensor, pose: Tensor | None) -> Tensor:
        """Return ``a``, ``[..., n, C, P]``; see :class:`MapDecoder`."""
        of_z = self.of_z(z, covariates).unsqueeze(-2)
        if self.mass is not None:
            a = self._of(of_z + self.points @ self.of_points)
            pose = _about_centre(pose, self.mass(a.unflatten(-1, self.size)), self.points)
        of_points = points @ self.of_points if pose is None else _moved(points, pose @ self.of_points)
        return self._of(of_z + of_points)

    def _of(self, first: Tensor) -> Tensor:
        """Return ``a``, ``[..., n, C, P]``, of what comes into the first layer, ``[..., n, P, n_hidden]``."""
        h = first.tanh()
        for layer in self.hidden:
            h = layer(h).tanh()
        return self.out(h).mT

    def weights(self) -> list[Tensor]:
        """Return the weights that training shrinks: none, as sharp edges need large ones."""
        return []


def _about_centre(pose: Tensor | None, mass: Tensor, points: Tensor) -> Tensor:
    """Return maps as of :func:`to_object` that take the origin to the centre of mass of the object.

    The mass, ``[n, P]``, lies at the points, ``[P, 2]``; where there is none, the origin stays where it is.
    """
    centre = (mass @ points) / (mass.sum(-1, keepdim=True) + _NOTHING)
    if pose is None:
        pose = torch.eye(3, 2, device=points.device)
    return pose + pad(centre.unsqueeze(-2), (0, 0, 2, 0))


def _moved(points: Tensor, matrices: Tensor) -> Tensor:
    """Return ``[x, y, 1] @ A``, ``[..., P, k]``, of points, ``[P, 2]``, and matrices, ``[..., 3, k]``."""
    with_one = torch.cat([points, torch.ones_like(points[:, :1])], 1)
    return (matrices.mT.flatten(0, -2) @ with_one.mT).view(*matrices.shape[:-2], -1, len(points)).mT


_NOTHING = 1e-6
_SHARPNESS = 3.0  # of the coordinates' weights at the start, so that edges need not grow slowly
