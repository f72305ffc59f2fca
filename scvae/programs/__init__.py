"""The generative programs, one file each, by name."""

from scvae.programs.gaussian import Gaussian
from scvae.programs.matrix_normal import MatrixNormalVAE
from scvae.programs.pose import Pose
from scvae.programs.program import Program
from scvae.programs.vq import VQ, VQGaussian
from scvae.programs.zinb import ZINB

#: The programs that :func:`scvae.fit` knows by name.
PROGRAMS: dict[str, type[Program]] = {
    program.name: program for program in (ZINB, Gaussian, VQ, VQGaussian, MatrixNormalVAE, Pose)
}

__all__ = ["PROGRAMS", "VQ", "ZINB", "Gaussian", "MatrixNormalVAE", "Pose", "Program", "VQGaussian"]
