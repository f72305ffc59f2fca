r"""Images, what they show set apart from how it lies: content, rotation and shift.

Generative process, for the image of each cell (covariates :math:`s` as in the other programs):

.. math::
    z &\sim \mathcal N(0, I_d) \\
    \theta &\sim \mathrm{Uniform}(-\pi, \pi) \quad\text{or}\quad \mathcal N(0, s_\theta^2) \\
    \Delta &\sim \mathcal N(0, s_\Delta^2 I_2) \\
    c_i &= m(z, s) + R(-\theta)\,(o_i - \Delta) \\
    x_i &\sim p(x_i \mid a(c_i; z, s))

:math:`o_i` are the coordinates of pixel :math:`i`: to the right and downwards from the centre of the image, in units of
half of its longer side. :math:`R(\theta)` turns from the x axis to the y axis, clockwise as one sees it. :math:`a` is a
function of coordinates, :math:`m` the centre of mass of what it draws, and the last line one of the likelihoods of
:class:`~scvae.modules.pixels.Pixels`: the object of ``z`` is turned by :math:`\theta` about its centre of mass, which
lies at :math:`\Delta`. Without :math:`m`, which the paper has not, the origin of :math:`a` could be anywhere in the
object, and elsewhere for each ``z``: shifts would mean nothing by themselves. Objects that are not shifted are turned
about the centre of the image, and have no :math:`m`. (The paper adds a shift after the rotation, which is the same
model, as the prior of the shift is the same in all directions.)

Guide: :math:`q(z | x)\, q(k | x)\, q(\theta | k, x)\, \mathcal N(\Delta; \mu_k, \sigma_k^2)`, with a wrapped or a plain
normal of :math:`\theta`. A network that answers an angle at once does so badly: images that are nearly the same have
answers that are a whole turn apart. Here a network sees the image turned by :math:`K` angles and says by how much each
of these copies is still turned and shifted; all of them are rendered, and :math:`q(k | x)` is the best there is, the
exact E-step. (:math:`k` belongs to the model too, as the copy whose angle is near :math:`\theta`, which leaves
:math:`p(x)` as it is.) The content is read off the mean over the copies, so that it is the same however the image was
turned, but for the angles between theirs.

References
----------
Bepler, Zhong, Kelley, Brignole and Berger 2019, Explicitly disentangling image content from translation and rotation
with spatial-VAE, NeurIPS, equations 1 to 5; for attention over poses, Nasiri and Bepler 2022, Unsupervised Object
Representation Learning using Translation and Rotation Group Equivariant VAE, NeurIPS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import pyro
import torch
from pyro.distributions import Categorical, Normal, TorchDistribution, Uniform
from torch import Tensor, nn
from torch.nn.functional import softplus

from scvae.boundary.options import Flag, Positive, Range, Whole
from scvae.data.cells import Batch, Cells, Schema
from scvae.distributions.circle import WrappedNormal, wrapped
from scvae.modules.nets import Layers
from scvae.modules.pixels import Pixels, kind_of_pixels
from scvae.modules.poses import CoordinateDecoder, MapDecoder, grid, look_up, to_object, turned
from scvae.programs.options import LatentOptions
from scvae.programs.program import Program

__all__ = ["Pose"]


class Pose(Program):
    """The spatial VAE of content and pose.

    Parameters
    ----------
    schema
        The images and covariates of the data.
    **options
        Those of :class:`Pose.Options`.
    """

    name = "pose"
    of_images = True
    #: The bound as it is from the first step: a KL that weighs more at the start empties dimensions of z for good, and
    #: one that weighs less is better with some data and worse with others.
    defaults = {
        "min_steps": 1400,
        "max_steps": 1400,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "kl_warmup": 0.0,
        "kl_level": 1.0,
        "validation_fraction": 0.0,
    }

    @dataclass(frozen=True, kw_only=True)
    class Options(LatentOptions):
        """Options of ``pose``.

        Parameters
        ----------
        pixels
            Likelihood of a pixel, ``"bernoulli"`` (values from 0 to 1), ``"gaussian"``, ``"poisson"`` or ``"nb"``
            (counts).
        rotate, translate
            Whether there are an angle and a shift at all.
        angle_scale
            Standard deviation of the prior of the angle, radians; None for a prior that is uniform on the circle.
        shift_scale
            Standard deviation of the prior of the shift, in units of half of the longer side of the image.
        encoder
            ``"rotations"``: as above. ``"plain"``: one network answers all at once.
        n_rotations
            Angles by which the image is turned for the first: spread over the circle, or over four standard deviations
            to either side of a normal prior that is narrower than that.
        decoder
            ``"map"``: ``a`` is an image, an output of a network, between whose pixels one interpolates.
            ``"coordinates"``: a network of the coordinates, as in the paper, which is run for each pixel and takes many
            times as long.
        n_latent, n_hidden, n_layers, encode_covariates, dropout_rate
            As in :class:`~scvae.programs.options.NetworkOptions`, ``z`` being the content.
        posterior, flow_depth, flow_width, prior, n_components
            As in :class:`~scvae.programs.options.LatentOptions`.
        """

        n_layers: Whole = 2
        pixels: Literal["bernoulli", "gaussian", "poisson", "nb"] = "bernoulli"
        rotate: Flag = True
        translate: Flag = True
        angle_scale: Positive | None = None
        shift_scale: Positive = 0.1
        encoder: Literal["rotations", "plain"] = "rotations"
        n_rotations: Annotated[int, Range(2)] = 8
        decoder: Literal["map", "coordinates"] = "map"

    def __init__(self, schema: Schema, **options: Any) -> None:
        o = self.Options(**options)
        super().__init__(schema, **o.as_dict())
        n_hidden, n_layers, dropout_rate = o.n_hidden, o.n_layers, o.dropout_rate
        rotate, translate, angle_scale = o.rotate, o.translate, o.angle_scale
        self.rotate, self.translate, self.angle_scale = rotate, translate, angle_scale
        shape = _, height, width = schema.channels
        self.unit = max(height, width) / 2  # pixels
        n_pixels, n_covariates = math.prod(shape), schema.n_covariates
        self.n_encoded = n_covariates if o.encode_covariates else 0

        self.pixels = Pixels(o.pixels, schema)
        self.searches = rotate and o.encoder == "rotations"
        n_copies = o.n_rotations if self.searches else 1
        self.encoder = Layers(n_pixels, self.n_encoded, n_hidden, n_layers, dropout_rate)
        self.reader = Layers(n_hidden, 0, n_hidden, 1, dropout_rate)
        self.finder = Layers(2 * n_hidden, 0, n_hidden, 1, dropout_rate)
        self.found = nn.Linear(n_hidden, _N_FOUND)
        self.q_z = o.make_posterior(n_hidden)
        self.p_z = o.make_prior(n_pixels, n_covariates)
        self.decoder: MapDecoder | CoordinateDecoder
        mass = self.pixels.mass if translate else None
        if o.decoder == "map":
            margin = math.ceil(o.shift_scale * max(height, width)) if translate else 0  # two standard deviations
            self.decoder = MapDecoder(o.n_latent, n_covariates, shape, margin, n_hidden, n_layers, mass)
        else:
            self.decoder = CoordinateDecoder(o.n_latent, n_covariates, shape, n_hidden, n_layers, mass)

        self.register_buffer("points", grid(height, width), persistent=False)  # [P, 2]
        turns = 2 * math.pi if angle_scale is None else min(2 * math.pi, _REACH * angle_scale)
        self.spacing = turns / n_copies
        angles = self.spacing * (torch.arange(n_copies) - (n_copies - 1) / 2)
        self.register_buffer("angles", angles, persistent=False)  # [K]
        places = turned(grid(height, width), angles.unsqueeze(1)) * max(height, width) / torch.tensor([width, height])
        self.register_buffer("places", places.view(1, -1, 2), persistent=False)  # [1, K * P, 2]
        self.register_buffer("evenly", torch.full((n_copies,), 1 / n_copies), persistent=False)
        self.register_buffer("zero", torch.zeros(()), persistent=False)
        self.register_buffer("shift_scale", torch.full((2,), o.shift_scale), persistent=False)

    points: Tensor
    angles: Tensor
    places: Tensor
    evenly: Tensor
    zero: Tensor
    shift_scale: Tensor

    @classmethod
    def kind_of(cls, options: Mapping[str, Any]) -> str:
        """Return what the likelihood of the pixels models."""
        return kind_of_pixels(options)

    def initialise(self, cells: Cells) -> None:
        """Start the decoder at the mean image."""
        self.decoder.start(self.pixels.start(cells))
        self.p_z.start(cells, lambda batch: self.pixels.inputs(batch.values).flatten(1))

    def decayed(self) -> list[Tensor]:
        """Return the weights by which ``z`` acts on a map."""
        return self.decoder.weights()

    def model(self, batch: Batch) -> None:
        """z, theta, Delta -> x; and theta -> k."""
        with pyro.plate("cells", len(batch)):
            z = pyro.sample("z", self.p_z(self.q_of))  # [n, d]
            theta = pyro.sample("theta", self.p_theta()) if self.rotate else None  # [n]
            delta = pyro.sample("Delta", self.p_delta()) if self.translate else None  # [n, 2]
            if theta is not None and self.searches:
                pyro.sample("k", Categorical(logits=self.nearness(theta)))  # [n]
            a = self.decoder(z, batch.covariates, self.points, to_object(theta, delta))
            pyro.sample("x", self.pixels(a), obs=None if batch.counts is None else batch.values)  # [n, C * H * W]

    def guide(self, batch: Batch) -> None:
        """x -> z; x -> k -> theta, Delta."""
        h, found = self.encode(self.pixels.inputs(batch.values), batch.covariates)
        with pyro.plate("cells", len(batch)):
            pyro.sample("z", self.q_z(h))  # [n, d]
            k = 0
            if self.searches:
                k = pyro.sample("k", Categorical(self.evenly), infer={"enumerate": "parallel"})  # [n]
            pose = found.at(k)
            if self.rotate:
                family = WrappedNormal if self.angle_scale is None else Normal
                pyro.sample("theta", family(pose.theta, pose.theta_scale))  # [n]
            if self.translate:
                pyro.sample("Delta", Normal(pose.delta, pose.delta_scale).to_event(1))  # [n, 2]

    def nearness(self, theta: Tensor) -> Tensor:
        """Return logits of the copies, ``[..., K]``, by how near their angle is to that of the object, ``[...]``."""
        return (theta.unsqueeze(-1) - self.angles).cos() / (self.spacing / 2) ** 2

    def p_theta(self) -> TorchDistribution:
        """Return the prior of the angle."""
        if self.angle_scale is None:
            return Uniform(self.zero - math.pi, self.zero + math.pi)
        return Normal(self.zero, self.zero + self.angle_scale)

    def p_delta(self) -> TorchDistribution:
        """Return the prior of the shift."""
        return Normal(torch.zeros_like(self.shift_scale), self.shift_scale).to_event(1)

    def encode(self, y: Tensor, covariates: Tensor, in_use: bool = False) -> tuple[Tensor, _Found]:
        """Return the last hidden layer that ``z`` is read off, ``[n, n_hidden]``, and the pose by each copy.

        Parameters
        ----------
        y
            Images, ``[n, C, H * W]``, about one in size.
        covariates
            ``[n, n_covariates]``.
        in_use
            Whether to compute as after training.
        """
        n, n_copies = len(y), len(self.angles)
        n_channels, height, width = self.schema.channels
        encoder, reader, finder = (
            layers.as_in_use if in_use else layers for layers in (self.encoder, self.reader, self.finder)
        )
        if n_copies > 1:
            copies = look_up(y.view(n, n_channels, height, width), self.places.expand(n, -1, -1))  # [n, C, K * P]
            y = copies.view(n, n_channels, n_copies, -1).transpose(1, 2)
        seen = covariates[:, : self.n_encoded]
        of_copies = encoder(y.reshape(n * n_copies, -1), seen.repeat_interleave(n_copies, 0)).view(n, n_copies, -1)
        h = reader(of_copies.mean(1))
        both = torch.cat([of_copies, h.unsqueeze(1).expand_as(of_copies)], -1)
        turn, x, y, *scales = self.found(finder(both.flatten(0, 1))).view(n, n_copies, -1).unbind(-1)
        if self.searches:
            turn = self.spacing * turn.tanh()
        theta_scale, *delta_scale = (softplus(scale) for scale in scales)
        return h, _Found(
            self.angles + turn,
            theta_scale + _MIN_SCALE,
            turned(torch.stack([x, y], -1), self.angles) * self.shift_scale,
            torch.stack(delta_scale, -1) * self.shift_scale + _MIN_SCALE,
        )

    def q_of(self, inputs: Tensor, covariates: Tensor) -> TorchDistribution:
        """Return ``q(z | u)`` of inputs that are no cells, for a VampPrior."""
        n_channels, *_ = self.schema.channels
        return self.q_z(self.encode(inputs.unflatten(1, (n_channels, -1)), covariates, in_use=True)[0])

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of ``q(z | x)``, each ``[n, d]``."""
        return self.q_z.moments(self.encode(self.pixels.inputs(batch.values), batch.covariates)[0])

    def best(self, batch: Batch) -> _Found:
        """Return the pose of each image by the copy by which it fits best, at the mean of the content."""
        h, found = self.encode(self.pixels.inputs(batch.values), batch.covariates)
        if not self.searches:
            return found.at(0)
        theta, delta = found.theta.T, found.delta.transpose(0, 1)
        pose = to_object(theta, delta if self.translate else None)
        a = self.decoder(self.q_z.moments(h)[0], batch.covariates, self.points, pose)
        fit = self.pixels(a).log_prob(batch.values)  # [K, n]
        if self.angle_scale is not None:
            fit = fit + self.p_theta().log_prob(theta)
        if self.translate:
            fit = fit + self.p_delta().log_prob(delta)
        return found.at(fit.argmax(0))

    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        """Return the expected pixels, ``[n, C * H * W]``, of the object as it is: neither turned nor shifted."""
        return self.pixels.expected(self.decoder(z, batch.covariates, self.points, None)).flatten(1)

    def pose_of(self, batch: Batch) -> Tensor | None:
        """Return angle in radians and shift in pixels of each image, ``[n, 3]``."""
        found = self.best(batch)
        theta = found.theta if self.rotate else torch.zeros_like(found.theta)
        delta = self.unit * found.delta if self.translate else torch.zeros_like(found.delta)
        return torch.cat([theta.unsqueeze(-1), delta], -1)

    def render(self, z: Tensor, batch: Batch, pose: Tensor | None, size: tuple[int, int] | None) -> Tensor:
        """Return the images that latent vectors stand for, in any pose and size; see :class:`Program`."""
        n_channels, height, width = self.schema.channels
        to_height, to_width = size or (height, width)
        x, y = grid(to_height, to_width, unit=1.0, device=z.device).unbind(-1)
        points = torch.stack([x * (width / to_width), y * (height / to_height)], -1) / self.unit
        matrices = None if pose is None else to_object(pose[:, 0], pose[:, 1:] / self.unit)
        a = self.decoder(z, batch.covariates, points, matrices)
        return self.pixels.expected(a).view(len(z), n_channels, to_height, to_width)

    def per_cell(self, batch: Batch) -> dict[str, Tensor]:
        """Return angle, ``[n]``, in radians, and shift, ``[n, 2]``, in pixels to the right and downwards.

        The shift is that of the object's centre of mass from the centre of the image. Each with its posterior standard
        deviation; and what the prior says of ``z``.
        """
        found = self.best(batch)
        answers: dict[str, Tensor] = {}
        if self.rotate:
            answers |= {"angle": wrapped(found.theta), "angle_std": found.theta_scale}
        if self.translate:
            answers |= {"shift": self.unit * found.delta, "shift_std": self.unit * found.delta_scale}
        return {**answers, **self.p_z.per_cell(self.embed(batch)[0])}


class _Found(NamedTuple):
    """Means and standard deviations of angle and shift by each copy, ``[n, K, ...]``, or by one of them, ``[n, ...]``.

    Angles are in radians, shifts in units of half of the longer side of the image.
    """

    theta: Tensor
    theta_scale: Tensor
    delta: Tensor
    delta_scale: Tensor

    def at(self, k: Tensor | int) -> _Found:
        """Choose a copy for each image, ``[n]``, or one for all, or several for all, ``[K, 1]``."""
        n = torch.arange(len(self.theta), device=self.theta.device)
        return _Found(*(part[n, k] for part in self))


_N_FOUND = 6  # angle, two shifts, and a scale of each
_MIN_SCALE = 1e-3
_REACH = 8.0  # of the copies' angles, in standard deviations of a normal prior
