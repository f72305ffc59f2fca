"""The generative programs, one file each, by name."""

from scvae.programs.program import Program
from scvae.programs.zinb import ZINB

#: The programs that :func:`scvae.fit` knows by name.
PROGRAMS: dict[str, type[Program]] = {program.name: program for program in (ZINB,)}

__all__ = ["PROGRAMS", "ZINB", "Program"]
