"""Log densities that Pyro lacks, or that must be fast on sparse counts."""

from scvae.distributions.counts import (
    NegativeBinomial,
    Poisson,
    SparseCounts,
    ZeroInflatedNegativeBinomial,
)

__all__ = ["NegativeBinomial", "Poisson", "SparseCounts", "ZeroInflatedNegativeBinomial"]
