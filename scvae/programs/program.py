"""What a program must answer."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, ClassVar

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from scvae.boundary.options import Options
from scvae.data.cells import Batch, Cells, Schema

__all__ = ["Program"]


class Program(nn.Module, ABC):
    """A generative model and its guide, declared with ``pyro.sample`` in one plate over the cells of a minibatch.

    All parameters are ordinary ``nn.Parameter``s (Pyro's global parameter store is not used), and everything that
    is read off the data lies in buffers, so that ``state_dict`` is the whole of a fitted program.

    Training records the operations of model and guide and replays them. What is to differ from step to step lies in
    tensors that are changed in place, or is drawn; where it does not (a Python number that counts the steps), the
    program is run as it is written, which is slower.

    Parameters
    ----------
    schema
        The genes and covariates of the data.
    options
        Whatever the program lets its user choose; plain numbers, strings, booleans or None, so that they can be
        saved as JSON.
    """

    #: Options of the program, a frozen dataclass; a program that has none takes those that its ``__init__`` names.
    Options: ClassVar[type[Options] | None] = None
    #: Name in the registry.
    name: ClassVar[str]
    #: What it models: ``"counts"``, ``"real"`` numbers, or numbers from 0 to 1, ``"unit"``.
    kind: ClassVar[str] = "counts"
    #: Whether it models images, ``image_key``, and not genes.
    of_images: ClassVar[bool] = False
    #: Whether labels can be given, ``labels_key``.
    takes_labels: ClassVar[bool] = False
    #: Settings of :class:`~scvae.inference.svi.Training` that it takes where the user gives none.
    defaults: ClassVar[Mapping[str, Any]] = {}
    #: Name of the site of the latent vector.
    latent: ClassVar[str] = "z"

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if (own := cls.__dict__.get("Options")) is not None:
            own.program = cls

    def __init__(self, schema: Schema, **options: Any) -> None:
        super().__init__()
        self.schema = schema
        self.options = options

    @classmethod
    def option_names(cls) -> list[str] | None:
        """Return the names of the options; None of a program that takes any."""
        parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]  # after self and schema
        named = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
        if len(named) == len(parameters):
            return named
        return None if cls.Options is None else [*named, *cls.Options.names()]

    def changed_options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        defaults = {each.name: each.default for each in inspect.signature(type(self).__init__).parameters.values()}
        if self.Options is not None:
            defaults |= {field.name: field.default for field in fields(self.Options)}
        return {name: value for name, value in self.options.items() if defaults.get(name, inspect) != value}

    @classmethod
    def kind_of(cls, options: Mapping[str, Any]) -> str:
        """Return what a program with these options models: by default what all of its class do."""
        return cls.kind

    @abstractmethod
    def initialise(self, cells: Cells) -> None:
        """Set what is read off the data (library sizes, mean expression), before training."""

    def initialise_batches(self, cells: Cells, batches: Iterable[int]) -> None:
        """Set what is read off the cells of single batches, given by code; by default nothing."""

    @abstractmethod
    def model(self, batch: Batch) -> None:
        """Declare the generative process; draws the counts where ``batch.counts`` is None."""

    @abstractmethod
    def guide(self, batch: Batch) -> None:
        """Declare the approximate posterior of the model's latent variables."""

    @abstractmethod
    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latent vector's posterior, each ``[n, n_latent]``."""

    @abstractmethod
    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        """Return the expression that a latent vector stands for, ``[n, G]``: of counts, fractions that sum to one."""

    def pose_of(self, batch: Batch) -> Tensor | None:
        """Return angle in radians and shift in pixels of each image, ``[n, 3]``; None of programs without poses."""
        return None

    def render(self, z: Tensor, batch: Batch, pose: Tensor | None, size: tuple[int, int] | None) -> Tensor:
        """Return the images that latent vectors stand for, ``[n, C, H, W]``; only of programs of images.

        Parameters
        ----------
        z
            ``[n, d]``.
        batch
            The cells, or others of the same covariates.
        pose
            Angle in radians and shift in pixels, ``[n, 3]``; None, and a program without poses, as the object is.
        size
            Height and width; None, and a program whose images have one size only, those of the data.
        """
        if pose is not None or size is not None:
            raise ValueError(f"{self.name!r} knows its images in one pose and one size: leave pose and size out.")
        return self.decode(z, batch).view(len(z), *self.schema.channels)

    def settle(self, cells: Cells, rows: Tensor) -> None:
        """Adapt at once to what some of the training cells have become: called a few times early in the training.

        By default a prior that can be fitted to draws of the posterior, is.
        """
        refit = getattr(getattr(self, "p_z", None), "refit", None)
        if refit is not None:
            found = [(part, *self.embed(batch)) for part, batch in cells.minibatches(1024, rows)]
            part, mean, std = map(torch.cat, zip(*found, strict=True))
            if (mean + std).isfinite().all():  # or else the next step says what is at fault
                refit(torch.normal(mean, std), *([] if cells.y is None else [cells.y[part].long()]))

    def observe_label(self, z: Tensor, batch: Batch) -> None:
        """Declare the label that is given, ``y``, ``[n]``, in cells that have one; nothing where labels are not known.

        Within the plate of the cells, in programs that have a :class:`~scvae.modules.priors.LabelledMixturePrior`.
        """
        if batch.y is not None:
            prior: Any = self.p_z
            with poutine.scale(scale=prior.label_weight), poutine.mask(mask=batch.y >= 0):
                pyro.sample("y", prior.given(z), obs=batch.y.clamp(min=0))

    def assign_labels(self, cells: Cells, rows: Tensor) -> None:
        """Fit what the labels say of the components to these cells, all of which have one: at each evaluation."""
        prior: Any = self.p_z
        minibatches = cells.minibatches(1024, rows)
        found = [(prior.mean_responsibilities(*self.embed(batch)), batch.y) for _, batch in minibatches]
        prior.assign(*map(torch.cat, zip(*found, strict=True)))

    def decayed(self) -> list[Tensor]:
        """Return the weights that training shrinks, at ``weight_decay`` to start with; by default none."""
        return []

    def deviations(self) -> list[Tensor]:
        """Return weights of covariates, which have a prior of scale ``deviation_scale``; by default none."""
        return []

    def monitored(self) -> dict[str, Tensor]:
        """Return numbers by name that the history is to hold at each evaluation, beside the ELBO; by default none."""
        return {}

    def gene_loadings(self) -> Tensor | None:
        """Return what each latent dimension does to each gene, ``[G, d]``, where that is a number; by default None."""
        return None

    def library(self, batch: Batch) -> Tensor:
        """Return the library size by which the decoded fractions are multiplied, ``[n]``."""
        return batch.library_size

    def per_cell(self, batch: Batch) -> dict[str, Tensor]:
        """Return further latents of each cell by name.

        Numbers, ``[n]``, are written to ``.obs`` as ``scvae_<name>`` (or what `key_added` begins with in the place of
        ``scvae``), integers among them as categories, ``label`` with the names of the labels; vectors, ``[n, k]``, to
        ``.obsm`` as ``<key_added>_<name>``, and the largest number of ``label_probability`` to ``.obs`` besides.
        """
        return {}
