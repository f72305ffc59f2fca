"""One step of the optimisation: minibatch, ELBO, gradient, Adam; recorded whole and replayed where that can be."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from scvae.boundary.ranks import ALONE, Ranks
from scvae.data.cells import Cells
from scvae.inference.evidence import elbo_terms
from scvae.inference.recording import Capture
from scvae.programs.program import Program

__all__ = ["Part", "Step"]

_log = logging.getLogger("scvae")

#: Steps of a size before it is captured. By then libraries and Adam have allocated what they keep; and to record a step
#: takes as long as some ten of them do by themselves, which fewer steps to come would not make up for.
_WARM_UP = 8
#: Relative differences of what a step changes that the order of sums may make; with other operations for the same step
#: at most a tenth of these was seen, of programs of images a sixth.
_SAME = {
    "weights": 0.3,
    "gradients": 0.2,
    "squares of gradients": 0.2,
    "statistics": 1e-2,
    "bounds": 1e-3,
    "counts": 0.0,
}
_LEAST = 1e-3  # of the largest change of its kind, below which a change is the rounding of a sum that is nothing


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
    (:mod:`scvae.inference.recording`). A CUDA graph has room for the minibatch with the most non-zeros that can come,
    so that none is captured twice, and its first replay is compared with the same step taken one operation at a time.
    Where steps cannot be replayed they are taken as the program declares them, and the log says so. Before each step
    the caller sets ``rate`` and ``kl_weight`` in place, and ``decays`` when they change.

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
    ranks
        The processes that take the steps together, each with its share of a minibatch.
    """

    def __init__(
        self,
        program: Program,
        cells: Cells,
        size: int,
        capture: Capture | None = None,
        deviation_scale: float = 1.0,
        parts: Sequence[Part] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        self.deviation_scale, self.ranks = deviation_scale, ranks
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
        #: Steps that were taken, and since the making or :meth:`restore` those of each size of minibatch.
        self.taken = 0
        self.taken_here: Counter[int] = Counter()
        self.replays: dict[int, tuple[Tensor, Callable[[], None]]] = {}
        #: Step, counted from 1, that the terms below are of: the first one that was not finite, or else the latest.
        self.seen = torch.zeros(1, dtype=torch.int64, device=cells.device)
        self.finite = torch.ones((), dtype=torch.bool, device=cells.device)
        self.terms: dict[str, Tensor] = {}

    def __call__(self, rows: Tensor, n_nonzero: int, n_cells: int | None = None) -> None:
        """Take a step with the cells `rows`, ``[n]``, which have so many non-zeros.

        With several processes they are the share of this one of a minibatch of `n_cells`.
        """
        n = len(rows) if n_cells is None else n_cells  # the same in all processes, which so capture the same steps
        if self.capture is None or self.taken_here[n] < _WARM_UP:
            self._take(rows, n_nonzero, n)
        elif n not in self.replays and self.capture.fixed_shapes:
            self._take_and_capture(rows, n, self.capture)
        else:
            if n not in self.replays:
                own = rows.clone()
                self.replays[n] = own, self.capture(partial(self._take, own, n_nonzero, n))
            static_rows, replay = self.replays[n]
            static_rows.copy_(rows)
            replay()
        self.taken += 1
        self.taken_here[n] += 1

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
        self.taken = int(self.count)
        self.taken_here.clear()
        self.seen.copy_(self.count)

    def _take(self, rows: Tensor, n_nonzero: int, n_cells: int, padded: bool = False) -> None:
        with self.ranks.sharing(n_cells) if self.ranks.group else nullcontext():
            log_likelihood, kl = elbo_terms(self.program, self.cells.batch(rows, n_nonzero, padded))
        reconstruction, divergence = (reduce(torch.add, terms.values()).mean() for terms in (log_likelihood, kl))
        if self.ranks.group:  # what is added up over the processes is then that of the whole minibatch
            reconstruction, divergence = (len(rows) / n_cells * term for term in (reconstruction, divergence))
        loss = self.kl_weight * divergence - reconstruction
        slopes = dict(zip(self.parameters, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True))
        with torch.no_grad():
            if self.ranks.group:
                reconstruction, divergence = self._add_up(slopes, reconstruction, divergence)
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

    def _add_up(self, slopes: dict[Tensor, Tensor], reconstruction: Tensor, divergence: Tensor) -> Sequence[Tensor]:
        """Let slopes and terms be their sums over the processes, in a single exchange; return the terms."""
        used = [(weights, slope) for weights, slope in slopes.items() if slope is not None]
        sizes = [slope.numel() for _, slope in used]
        flat = torch.cat([*(slope.reshape(-1) for _, slope in used), torch.stack([reconstruction, divergence])])
        *parts, terms = self.ranks.add_up(flat).split([*sizes, 2])
        for (weights, slope), part in zip(used, parts, strict=True):
            slopes[weights] = part.view_as(slope)
        return terms.unbind()

    def _watch(self, terms: dict[str, Tensor], finite: Tensor) -> None:
        """Keep the terms of this step, unless one before it was not finite."""
        for name, term in terms.items():
            if name not in self.terms:
                self.terms[name] = term.new_zeros(self.size)
            kept = self.terms[name][: len(term)]
            torch.where(self.finite, term, kept, out=kept)
        torch.where(self.finite, self.count, self.seen, out=self.seen)
        self.finite &= finite

    def _take_and_capture(self, rows: Tensor, n_cells: int, capture: Capture) -> None:
        """Take a step with these cells, and capture one with as many, which has room for any.

        The step is taken one operation at a time, and again by a replay, from the same weights and random numbers. Both
        must have the same outcome, but for what another order of the sums makes of it; else, or where nothing can be
        captured, the outcome of the first is kept, and steps are taken one by one from then on. Of several processes
        all replay, or none does.
        """
        static_rows = rows.clone()
        take = partial(self._take, static_rows, self.cells.most_nonzeros(len(rows)), n_cells, padded=True)
        before = self._outcome()
        take()
        outcome = self._outcome()
        self._put(before)
        replay, reason, wrong = None, "", ""
        try:
            replay = capture(take)
        except RuntimeError as error:
            reason = str(error)
        if not self.ranks.agreed(replay is None) and replay is not None:
            try:
                replay()
                wrong = _difference(before, outcome, self._outcome())
            except RuntimeError as error:
                reason = str(error)
            if not self.ranks.agreed(bool(reason or wrong)):
                self.replays[n_cells] = static_rows, replay
                return
        if not wrong:
            reason = reason or "another process could not"
            _log.info("Steps are not captured as a CUDA graph (%s); they are taken one by one.", reason)
        if wrong:
            warnings.warn(
                f"On this device ({self.cells.device}) a step that is replayed as a CUDA graph leaves other {wrong} "
                "than the same step taken one operation at a time. So no step is replayed: the training is right, and "
                "slower. Another version of torch or of the driver may do better.",
                stacklevel=2,
            )
        self.capture = None
        self.replays.clear()
        self._put(outcome)

    def _changing(self) -> dict[str, list[Tensor]]:
        """Return all that a step changes, by what it is, beside the random numbers."""
        return {
            "weights": list(self.program.parameters()),
            "gradients": [mean for _, mean, _ in self.adam.states],
            "squares of gradients": [square for *_, square in self.adam.states],
            "statistics": list(self.program.buffers()),
            "bounds": [self.sums, *self.terms.values()],
            "counts": [self.count, self.seen, self.finite],
        }

    def _outcome(self) -> _Outcome:
        """Return a copy of all that a step changes."""
        changing = {name: [each.detach().clone() for each in tensors] for name, tensors in self._changing().items()}
        return _Outcome(changing, _random_state(self.cells.device))

    def _put(self, outcome: _Outcome) -> None:
        """Go on from there."""
        with torch.no_grad():
            for name, tensors in self._changing().items():
                for tensor, value in zip(tensors, outcome.changing[name], strict=True):
                    tensor.copy_(value)
        _set_random_state(self.cells.device, outcome.random)


class _Outcome(NamedTuple):
    """What a step leaves behind: tensors, by what they are, and the state of the random numbers."""

    changing: dict[str, list[Tensor]]
    random: Tensor


def _difference(before: _Outcome, one: _Outcome, other: _Outcome) -> str:
    """Return in what two outcomes of a step are not the same; nothing where they are, or the first is not finite.

    Compared are the changes, tensor by tensor, by their norms. Weights are compared all at once: Adam moves those that
    matter to nothing (a bias before a batch norm), whose gradients are rounding, as far as others.
    """
    if not one.changing["counts"][-1]:
        return ""
    is_same = {}
    for name, tensors in before.changing.items():
        if not tensors:
            continue
        changes = [
            [(after.double() - start.double()).flatten() for start, after in zip(tensors, afters, strict=True)]
            for afters in (one.changing[name], other.changing[name])
        ]
        if name == "weights":
            changes = [[torch.cat(of_all)] for of_all in changes]
        sizes = torch.stack([mine.norm() for mine in changes[0]])
        errors = torch.stack([(mine - its).norm() for mine, its in zip(*changes, strict=True)])
        is_same[name] = (errors <= _SAME[name] * sizes.maximum(_LEAST * sizes.max())).all()
    found = torch.stack(list(is_same.values())).tolist()  # waits for the device once
    wrong = [name for name, same in zip(is_same, found, strict=True) if not same]
    return " and ".join([", ".join(wrong[:-1]), wrong[-1]] if len(wrong) > 1 else wrong)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


class _Adam:
    """Adam; as torch.optim.Adam, whose making takes a second for what is not used."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.states = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    def step(self, gradients: Sequence[Tensor | None], rate: Tensor, n_taken: Tensor) -> None:
        """Take a step of that size along the gradients, where there are any; `n_taken`, a float, counts it too."""
        used = [(*state, _as(state[0], g)) for state, g in zip(self.states, gradients, strict=True) if g is not None]
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


def _as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient in the layout of the parameter, for the kernel goes through the memory of both alike."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
