"""A fitted model: what can be asked of it, and how it is saved."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData, ImplicitModificationWarning
from pyro import poutine
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from scipy import sparse
from torch import Tensor

from scvae import evidence
from scvae.cells import Batch, Cells, Schema, covariate_matrix
from scvae.programs import PROGRAMS, Program
from scvae.svi import seeded, unchecked

__all__ = ["Fitted", "load"]

_FORMAT = 1
_CHUNK = 1024  # cells at a time


class Fitted:
    """A fitted model; made by :func:`scvae.fit` and :func:`scvae.load`.

    Cells given to its methods are read as those that it was fitted to: the same layer, covariates and genes, genes
    matched by name. The order of the cells is kept, and the AnnData is left as it is.

    Attributes
    ----------
    program
        The generative model and its guide, a ``torch.nn.Module``.
    history
        The course of the training: see :func:`scvae.svi.train`.
    key_added
        Key of ``.obsm`` under which the embedding was written.
    """

    def __init__(self, program: Program, history: dict[str, list], key_added: str = "X_scvae") -> None:
        self.program = program.eval()
        self.history = history
        self.key_added = key_added

    def __repr__(self) -> str:
        schema = self.program.schema
        return (
            f"Fitted {self.program.name!r}: {len(schema.genes)} genes, {len(schema.batches)} batch(es), "
            f"{_describe(self.program.options)}"
        )

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.program.parameters()).device

    def embed(
        self, adata: AnnData, *, unknown_batch: str = "error", missing_genes: str = "error"
    ) -> np.ndarray:
        """Return the posterior mean of each cell's latent vector, ``[n_cells, n_latent]``, float32.

        Parameters
        ----------
        adata
            The cells. Genes may be in any order, and others may be among them.
        unknown_batch
            Cells of batches (or other categories) that the model has not seen: ``"error"``, or ``"ignore"``, which
            leaves the covariate out.
        missing_genes
            ``"error"``, or ``"zero"``, which takes the counts of genes that are missing for 0.

        Raises
        ------
        KeyError, ValueError
            As :func:`scvae.fit`, and for unknown batches and missing genes.
        """
        cells = self._cells(adata, unknown_batch=unknown_batch, missing_genes=missing_genes)
        return self._each(cells, lambda batch: self.program.embed(batch)[0])

    def denoise(
        self,
        adata: AnnData,
        *,
        batch: str | Sequence[str] | None = None,
        genes: Sequence[str] | None = None,
        library_size: float | str = 1.0,
        n_samples: int | None = None,
        layer_added: str | None = None,
        seed: int = 0,
        unknown_batch: str = "error",
        missing_genes: str = "error",
    ) -> np.ndarray:
        """Return the expression that the model sees behind the counts, ``[n_cells, n_genes]``, float32.

        Parameters
        ----------
        adata
            The cells.
        batch
            Decode all cells as if they were of this batch; of several, the mean. By default each as of its own.
        genes
            The genes wanted, in this order; by default all that are modelled.
        library_size
            What the expression of a cell sums to over all genes of the model: 1 gives fractions, 1e4 counts per ten
            thousand, ``"cell"`` expected counts before dropout, with the cell's own library size.
        n_samples
            Average over draws of the posterior. By default its mean is decoded, without averaging.
        layer_added
            Write the result to this layer of the AnnData too; genes that are not modelled get NaN.
        seed
            Of the draws.
        unknown_batch, missing_genes
            As in :meth:`embed`.
        """
        schema = self.program.schema
        columns = None if genes is None else torch.tensor(_index(genes, schema.genes, "gene"), device=self.device)
        codes: list[int | None] = [None]
        if batch is not None:
            if schema.batch_key is None:
                raise ValueError("The model was fitted without batch_key: it cannot decode as of another batch.")
            codes = list(_index([batch] if isinstance(batch, str) else batch, schema.batches, "batch"))
        if isinstance(library_size, str) and library_size != "cell":
            raise ValueError(f"library_size is a number or 'cell', not {library_size!r}.")

        def expression(cells: Batch) -> Tensor:
            draws = [self.program.embed(cells)[0]] if n_samples is None else self._posterior(cells, n_samples)
            total: Tensor | float = 0.0
            for code in codes:
                to = cells if code is None else _as_of(cells, code, schema)
                for z in draws:
                    rho = self.program.decode(z, to)
                    total = total + (rho if columns is None else rho[:, columns])
            size = self.program.library(cells).unsqueeze(-1) if library_size == "cell" else float(library_size)
            return total / (len(codes) * len(draws)) * size

        cells = self._cells(adata, unknown_batch=unknown_batch, missing_genes=missing_genes)
        result = self._each(cells, expression, seed)
        if layer_added is not None:
            names = list(genes if genes is not None else schema.genes)
            layer = np.full(adata.shape, np.nan, dtype=np.float32)
            at = adata.var_names.get_indexer(names)
            layer[:, at[at >= 0]] = result[:, at >= 0]
            adata.layers[layer_added] = layer
        return result

    def generate(self, n: int, *, batch: str | None = None, seed: int = 0) -> AnnData:
        """Draw new cells from the prior.

        Parameters
        ----------
        n
            How many.
        batch
            Of which batch; by default each cell's is drawn, all being equally likely, and so are the other categorical
            covariates. Continuous covariates are at their mean.
        seed
            Of the draws.

        Returns
        -------
        AnnData
            Counts in ``.X`` (CSR), covariates in ``.obs``, the latent vectors in ``.obsm[key_added]``.
        """
        schema, device = self.program.schema, self.device
        with seeded(seed, device), unchecked(), torch.no_grad():
            codes = torch.stack(
                [torch.randint(width, (n,), device=device) for width in schema.widths]
                or [torch.empty(n, dtype=torch.int64, device=device)],
                dim=1,
            )[:, : len(schema.widths)]
            if batch is not None:
                codes[:, 0] = _index([batch], schema.batches, "batch")[0]
            counts, latents = [], []
            for part in codes.split(_CHUNK):
                trace = poutine.trace(self.program.model).get_trace(self._blank(part))
                counts.append(sparse.csr_matrix(trace.nodes["x"]["value"].cpu().numpy()))
                latents.append(trace.nodes["z"]["value"].cpu().numpy())
        adata = AnnData(sparse.vstack(counts, format="csr"), obsm={self.key_added: np.concatenate(latents)})
        adata.var_names = list(schema.genes)
        for i, (key, names) in enumerate((schema.categories or {}).items()):
            adata.obs[key] = np.asarray(names)[codes[:, i].cpu().numpy()]
        return adata

    def elbo(self, adata: AnnData, *, n_samples: int = 1, seed: int = 0) -> np.ndarray:
        """Return the evidence lower bound of each cell, nats, ``[n_cells]``, estimated with `n_samples` draws."""
        return self._each(self._cells(adata), lambda batch: evidence.elbo(self.program, batch, n_samples), seed)

    def log_likelihood(
        self, adata: AnnData, *, n_samples: int = 256, method: str = "importance", seed: int = 0
    ) -> np.ndarray:
        r"""Return an estimate of :math:`\log p(x \mid s)` of each cell, nats, ``[n_cells]``.

        Parameters
        ----------
        adata
            The cells.
        n_samples
            Draws per cell.
        method
            ``"importance"``: weighted draws from the guide (Burda et al. 2016, equation 8), a lower bound in
            expectation that tightens with `n_samples`. ``"prior"``: plain Monte Carlo over the prior, for comparison.
        seed
            Of the draws.
        """
        estimators = {"importance": evidence.importance_weighted, "prior": evidence.prior_monte_carlo}
        if method not in estimators:
            raise ValueError(f"method is one of {', '.join(map(repr, estimators))}, not {method!r}.")
        estimate = estimators[method]
        return self._each(self._cells(adata), lambda batch: estimate(self.program, batch, n_samples), seed)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Save the model to a folder, as ``weights.safetensors`` and ``model.json``; see :func:`scvae.load`.

        Raises
        ------
        FileExistsError
            If the folder exists, unless `overwrite` is set.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists: pass overwrite=True to replace it.")
        weights = save_tensors({k: v.contiguous().cpu() for k, v in self.program.state_dict().items()})
        content = {
            "version": version("scvae-pyro"),
            "program": self.program.name,
            "options": self.program.options,
            "schema": asdict(self.program.schema),
            "history": self.history,
            "key_added": self.key_added,
        }
        header = {"format": _FORMAT, "sha256": {"weights": _digest(weights), "content": _digest(_canonical(content))}}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # complete or not at all
            new = Path(folder) / path.name
            new.mkdir()
            (new / "weights.safetensors").write_bytes(weights)
            (new / "model.json").write_text(json.dumps({**header, "content": content}, indent=1))
            if path.exists():
                shutil.move(path, Path(folder) / "old")
            shutil.move(new, path)

    def _cells(self, adata: AnnData, **how: str) -> Cells:
        return Cells.read(adata, self.program.schema, device=self.device, **how)

    def _each(self, cells: Cells, answer: Callable[[Batch], Tensor], seed: int = 0) -> np.ndarray:
        """Ask something of all cells, chunk by chunk, in order."""
        parts: np.ndarray | None = None
        with seeded(seed, self.device), unchecked(), torch.no_grad():
            for rows, batch in cells.minibatches(_CHUNK):
                part = answer(batch).cpu().numpy()
                if parts is None:
                    parts = np.empty((len(cells), *part.shape[1:]), dtype=part.dtype)
                parts[rows.cpu().numpy()] = part
        assert parts is not None
        return parts

    def _posterior(self, batch: Batch, n_samples: int) -> list[Tensor]:
        return [
            poutine.trace(self.program.guide).get_trace(batch).nodes["z"]["value"] for _ in range(n_samples)
        ]

    def _blank(self, codes: Tensor) -> Batch:
        """Cells without counts, of given categories, with all else at its mean."""
        schema, n = self.program.schema, len(codes)
        continuous = torch.zeros(n, len(schema.continuous or {}), device=codes.device)
        return Batch(
            None,
            torch.ones(n, device=codes.device),
            codes[:, 0] if schema.batch_key is not None else torch.zeros(n, dtype=torch.int64, device=codes.device),
            covariate_matrix(codes, continuous, schema.widths),
        )

    def _write(self, adata: AnnData, cells: Cells) -> None:
        """Write everything that :func:`scvae.fit` promises to the AnnData."""
        mean, std = np.split(self._each(cells, lambda batch: torch.cat(self.program.embed(batch), 1)), 2, axis=1)
        scalars = self._each(
            cells, lambda batch: torch.stack([*self.program.per_cell(batch).values(), batch.library_size], 1)
        )
        names = list(self.program.per_cell(cells.batch(torch.arange(2, device=cells.device))))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImplicitModificationWarning)  # a view becomes an AnnData of its own
            adata.obsm[self.key_added] = np.ascontiguousarray(mean)
            adata.obsm[self.key_added + "_std"] = np.ascontiguousarray(std)
            for i, name in enumerate(names):
                adata.obs[f"scvae_{name}"] = scalars[:, i]
            adata.uns["scvae"] = {
                "version": version("scvae-pyro"),
                "program": self.program.name,
                "key_added": self.key_added,
                "options": {k: v for k, v in self.program.options.items() if v is not None},
                "schema": {
                    "n_genes": len(self.program.schema.genes),
                    "batches": np.asarray(self.program.schema.batches, dtype=object),
                },
                "history": {k: np.asarray(v) for k, v in self.history.items() if k != "stopped"},
                "stopped": self.history["stopped"][0],
            }


def load(path: str | Path, *, program: type[Program] | None = None, device: str = "cpu") -> Fitted:
    """Load a model that :meth:`Fitted.save` saved. No code is run from the files.

    Parameters
    ----------
    path
        The folder.
    program
        The class, if it is one of your own.
    device
        Where the model is to compute.

    Raises
    ------
    FileNotFoundError
        If the folder or a file in it is missing.
    ValueError
        If the files were cut off or edited, or are of a later format.
    """
    path = Path(path)
    for name in ("model.json", "weights.safetensors"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} holds no scvae model: {name} is missing.")
    weights = (path / "weights.safetensors").read_bytes()
    try:
        file = json.loads((path / "model.json").read_text())
        form, content, sha256 = file["format"], file["content"], file["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path / 'model.json'} is damaged: it is not the JSON that scvae writes.") from None
    if form != _FORMAT:
        raise ValueError(f"{path} is in format {form}; this version of scvae reads format {_FORMAT}: update scvae.")
    if sha256["content"] != _digest(_canonical(content)) or sha256["weights"] != _digest(weights):
        raise ValueError(f"{path} is damaged: its contents are not those that were saved. Save the model anew.")
    kind = program or PROGRAMS.get(content["program"])
    if kind is None:
        raise ValueError(f"{path} holds the program {content['program']!r}: pass its class, program=….")
    made = kind(_schema(content["schema"]), **content["options"])
    made.load_state_dict(load_tensors(weights))
    return Fitted(made.to(device), content["history"], content["key_added"])


def _schema(content: dict[str, Any]) -> Schema:
    return Schema(
        **{
            **content,
            "genes": tuple(content["genes"]),
            "categories": {key: tuple(names) for key, names in content["categories"].items()},
            "continuous": {key: tuple(values) for key, values in content["continuous"].items()},
        }
    )


def _as_of(batch: Batch, code: int, schema: Schema) -> Batch:
    """The same cells as if they were of another batch."""
    covariates = batch.covariates.clone()
    covariates[:, : len(schema.batches)] = 0
    covariates[:, code] = 1
    return replace(batch, s=torch.full_like(batch.s, code), covariates=covariates)


def _index(wanted: Sequence[str], names: Sequence[str], what: str) -> list[int]:
    place = {name: i for i, name in enumerate(names)}
    unknown = [name for name in wanted if name not in place]
    if unknown:
        known = ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")
        raise ValueError(f"The model knows no {what} {', '.join(map(repr, unknown[:5]))}; it knows {known}.")
    return [place[name] for name in wanted]


def _describe(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
