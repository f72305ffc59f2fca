"""One step of the optimisation: minibatch, ELBO, gradient, Adam; recorded whole and replayed where that can be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from scvae.data.cells import Cells
from scvae.inference.evidence import elbo_terms
from scvae.inference.recording import Capture
from scvae.programs.program import Program

__all__ = ["Part", "Step"]

_log = logging.getLogger("scvae")

_WARM_UP = 3  # steps before the capture, in which libraries and Adam allocate what they keep
_SLACK = 1.1  # by which a captured minibatch has more room for non-zeros than any that was seen


class Part(NamedTuple):
    """Entries of a parameter that are learnt while the others keep their values.

    They have a normal prior about where they start.

    Parameters
    ----------
    parameter
        Of the program.
    is_learnt
        1 for the entries that are learnt, 0 for those that are kept, in the shape of the parameter.
    start
        The values of the parameter before the first step.
    """

    parameter: Tensor
    is_learnt: Tensor
    start: Tensor


class Step:
    """Takes one step of stochastic gradient ascent on the ELBO each time it is called.

    All that changes from step to step (KL weight, learning rate, count of the steps, sums for the history, the terms
    in which a fault first showed) lies in tensors on the device, so that nothing waits for the device, and the whole
    can be captured: after a few steps each size of minibatch is recorded and replayed from then on
    (:mod:`scvae.inference.recording`). Where that cannot be, steps are taken as the program declares them, and the log
    says so. Before each step the caller sets ``rate`` and ``kl_weight`` in place, and ``decays`` when they change.

    Parameters
    ----------
    program, cells
        What is trained, on what.
    size
        Cells in a minibatch, at most.
    capture
        Records a function and returns one that replays it; None where steps are not to be captured.
    deviation_scale
        Standard deviation of the prior of ``program.deviations()``, or of the `parts`.
    parts
        All that is learnt, where that is not the whole program; then no weights shrink.
    """

    def __init__(
        self,
        program: Program,
        cells: Cells,
        size: int,
        capture: Capture | None = None,
        deviation_scale: float = 1.0,
        parts: Sequence[Part] = (),
    ) -> None:
        self.deviation_scale = deviation_scale
        self.program, self.cells, self.size, self.capture = program, cells, size, capture
        self.rate, self.kl_weight = torch.zeros((), device=cells.device), torch.zeros((), device=cells.device)
        self.parts = parts
        self.parameters: list[Tensor] = [p for p in program.parameters() if p.requires_grad]
        self.shrunk, self.deviations = program.decayed(), program.deviations()
        if parts:
            self.parameters, self.shrunk, self.deviations = [part.parameter for part in parts], [], []
        #: Rates, relative to the learning rate, at which these shrink, ``[n_matrices]``.
        self.decays = torch.zeros(len(self.shrunk), device=cells.device)
        self.adam = _Adam(self.parameters)
        self.count = torch.zeros(1, dtype=torch.int64, device=cells.device)
        self.sums = torch.zeros(2, device=cells.device)  # log likelihood and KL, nats a cell, since they were taken
        #: Steps that were taken, and those of them that were taken since the making or :meth:`restore`.
        self.taken = self.taken_here = 0
        self.replays: dict[int, tuple[int, Tensor, Callable[[], None]]] = {}
        #: Step, counted from 1, that the terms below are of: the first one that was not finite, or else the latest.
        self.seen = torch.zeros(1, dtype=torch.int64, device=cells.device)
        self.finite = torch.ones((), dtype=torch.bool, device=cells.device)
        self.terms: dict[str, Tensor] = {}

    def __call__(self, rows: Tensor, n_nonzero: int) -> None:
        """Take a step with the cells `rows`, ``[n]``, which have so many non-zeros."""
        replay = self._replay(rows, n_nonzero, self.capture) if self.capture and self.taken_here >= _WARM_UP else None
        if replay is None:
            self._take(rows, n_nonzero)
        else:
            replay()
        self.taken += 1
        self.taken_here += 1

    def state(self) -> dict[str, Tensor]:
        """Return what the next steps depend on, beside the program and the random numbers, for :meth:`restore`."""
        moments = {
            f"{name}.{i}": moment
            for i, (_, mean, square) in enumerate(self.adam.states)
            for name, moment in (("mean", mean), ("square", square))
        }
        return {**moments, "count": self.count, "sums": self.sums, "decays": self.decays}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a training was."""
        for name, value in self.state().items():
            value.copy_(state[name])
        self.taken, self.taken_here = int(self.count), 0
        self.seen.copy_(self.count)

    def _take(self, rows: Tensor, n_nonzero: int, padded: bool = False) -> None:
        log_likelihood, kl = elbo_terms(self.program, self.cells.batch(rows, n_nonzero, padded))
        reconstruction, divergence = (reduce(torch.add, terms.values()).mean() for terms in (log_likelihood, kl))
        loss = self.kl_weight * divergence - reconstruction
        slopes = dict(zip(self.parameters, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True))
        with torch.no_grad():
            for weights in self.deviations:  # with the slope of minus the log density of their prior, per cell
                slopes[weights] = slopes[weights].add(weights, alpha=self.deviation_scale**-2 / len(self.cells))
            for weights, is_learnt, start in self.parts:  # likewise; Adam leaves alone what never had a slope
                slopes[weights] = is_learnt * slopes[weights].add(
                    weights - start, alpha=self.deviation_scale**-2 / len(self.cells)
                )
            self.count += 1
            for weights, kept in zip(self.shrunk, (1 - self.rate * self.decays).unbind(), strict=True):
                weights.mul_(kept)
            self.adam.step(list(slopes.values()), self.rate, self.count.squeeze().float())
            self.sums += torch.stack([reconstruction, divergence])
            finite = (reconstruction + divergence) * 0 == 0  # torch.isfinite is four operations
            self._watch({**log_likelihood, **kl}, finite)

    def _watch(self, terms: dict[str, Tensor], finite: Tensor) -> None:
        """Keep the terms of this step, unless one before it was not finite."""
        for name, term in terms.items():
            if name not in self.terms:
                self.terms[name] = term.new_zeros(self.size)
            kept = self.terms[name][: len(term)]
            torch.where(self.finite, term, kept, out=kept)
        torch.where(self.finite, self.count, self.seen, out=self.seen)
        self.finite &= finite

    def _replay(self, rows: Tensor, n_nonzero: int, capture: Capture) -> Callable[[], None] | None:
        """Return what replays a step of so many cells, with these cells put where it reads them."""
        room, static_rows, replay = self.replays.get(len(rows), (0, rows, None))
        if replay is None or (capture.fixed_shapes and n_nonzero > room):
            room, static_rows = int(_SLACK * n_nonzero), rows.clone()
            try:
                replay = capture(lambda: self._take(static_rows, room, padded=capture.fixed_shapes))
            except RuntimeError as error:
                _log.info("Steps are not captured as a CUDA graph (%s); they are taken one by one.", error)
                self.capture = None
                return None
            self.replays[len(rows)] = (room, static_rows, replay)
        static_rows.copy_(rows)
        return replay


class _Adam:
    """Adam; as torch.optim.Adam, whose making takes a second for what is not used."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.states = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    def step(self, gradients: Sequence[Tensor | None], rate: Tensor, n_taken: Tensor) -> None:
        """Take a step of that size along the gradients, where there are any; `n_taken`, a float, counts it too."""
        used = [(*state, g) for state, g in zip(self.states, gradients, strict=True) if g is not None]
        if not used:
            return
        parameters, means, squares, given = map(list, zip(*used, strict=True))
        torch._fused_adamw_(  # the one kernel of torch.optim.AdamW(fused=True)
            parameters,
            given,
            means,
            squares,
            [],
            [n_taken] * len(used),
            lr=rate,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
