"""Log densities that Pyro lacks, or that must be fast on sparse counts."""

from scvae.distributions.circle import WrappedNormal
from scvae.distributions.counts import (
    NegativeBinomial,
    Poisson,
    SparseCounts,
    ZeroInflatedNegativeBinomial,
)
from scvae.distributions.matrix_normal import MatrixNormal

__all__ = [
    "MatrixNormal",
    "NegativeBinomial",
    "Poisson",
    "SparseCounts",
    "WrappedNormal",
    "ZeroInflatedNegativeBinomial",
]
