r"""Compiled for a CPU: the log density of counts with its gradient, and minibatches of a CSR matrix.

What a few dozen operations on ``[n, G]`` matrices do in as many passes over memory is done here cell by cell, in one.
Every gene is taken as if its count were zero, in single precision, with :math:`a = -\theta \log(1 + \mu / \theta)` and

.. math::
    p(0) = \frac{1 + e^{a - \pi}}{1 + e^{-\pi}}, \qquad P(\text{dropout} | 0) = \frac 1 {1 + e^{a - \pi}},

and then the non-zeros, in double precision, in their places. Each loop is simple enough to be vectorised: few arrays,
no branch, and exponential and logarithm by their series, as numba has no vectorised ones.

The first use after an installation compiles for some seconds; what was compiled is kept on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

__all__ = ["are_compiled", "by_column", "log_prob", "take_rows"]

_BLOCK = 256  # non-zeros taken at a time
_N_FACTORS = 128  # of a product, which stays within single precision
_LEAST_GATE = -80.0  # logit: a dropout probability below 1e-35 is taken for that

# Division by zero is no error, as in torch; a product and a sum may be rounded together; and NaN remains NaN.
_settings: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
_inline = njit(forceinline=True, **_settings)


def _kept(function: Callable) -> Callable:
    """Compile, and keep what was compiled on disk where there is a place for it."""
    try:
        compiled = njit(cache=True, nogil=True, **_settings)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written to
        compiled = njit(nogil=True, **_settings)(function)

    @wraps(compiled, updated=())
    def loop(*arguments: Any) -> Any:
        try:
            return compiled(*arguments)
        except SystemError as error:  # which the interpreter makes of a Ctrl-C while results are handed over
            cause: BaseException | None = error
            while isinstance(cause, SystemError):
                cause = cause.__cause__
            raise cause or error from None

    return loop


# ---- Exponential and logarithm -----------------------------------------------------------------------------


def _polynomial(coefficients: list[Any]) -> Callable:
    """Compile a polynomial, constant term first."""
    first, *others = coefficients
    if not others:
        return _inline(lambda x: first)
    rest = _polynomial(others)
    return _inline(lambda x: rest(x) * x + first)


def _elementary(
    real: Any, integer: Any, bits: Callable, from_bits: Callable, n_exp: int, n_log: int
) -> tuple[Callable, ...]:
    """Compile exp, and log and log1p of positive numbers up to a quarter of the largest; errors of a few roundings.

    And what splits such a number ``2^n f`` into `n` and `f`, which is from the root of 1/2 to that of 2.

    ``exp(n log 2 + f) = 2^n exp(f)`` and ``log(2^n (1 + f)) = n log 2 + 2 artanh(f / (2 + f))``, ``f`` being small,
    by so many terms of the Taylor series of exp and artanh. `bits` and `from_bits`: number to integer and back.
    """
    limits = np.finfo(real)
    n_bits, one = integer(limits.nmant), real(1).view(integer)
    exponent = integer(-1 << n_bits)
    middle = real(math.sqrt(0.5)).view(integer)  # 1 + f is from here to twice as much
    least, most = real(math.log(limits.tiny)), real((limits.maxexp + 0.1) * math.log(2))  # exp(most) is infinite
    largest = real(2.0 ** (limits.maxexp - 2))
    rounder = real(1.5 * 2.0**n_bits)  # a number that is added to it is rounded to an integer, in the lowest bits
    log2_e, log_2 = real(1 / math.log(2)), real(math.log(2))
    log_2_head = (log_2.view(integer) & integer(-1 << n_bits // 2)).view(real)  # its products with n are exact
    log_2_tail = real(Decimal(2).ln() - Decimal(float(log_2_head)))
    exp_series = _polynomial([real(1 / math.factorial(k)) for k in range(n_exp)])
    artanh_series = _polynomial([real(2 / (2 * k + 1)) for k in range(n_log)])

    @_inline
    def exp(x):
        x = least if x < least else x
        x = most if x > most else x
        rounded = x * log2_e + rounder
        n = rounded - rounder
        power = from_bits(integer((bits(rounded) << n_bits) + one))
        return power * exp_series((x - n * log_2_head) - n * log_2_tail)

    @_inline
    def log_of(n, f):
        s = f / (f + real(2))
        return real(np.int32(n)) * log_2 + s * artanh_series(s * s)

    @_inline
    def split(x):
        n = integer((bits(x) - middle) & exponent)
        return n >> n_bits, x * from_bits(integer(one - n))

    @_inline
    def log(x):
        n, f = split(x)
        return log_of(n, f - real(1))

    @_inline
    def log1p(x):
        x = largest if x > largest else x
        n = integer((bits(x + real(1)) - middle) & exponent)
        power = from_bits(integer(one - n))
        return log_of(n >> n_bits, x * power + (power - real(1)))

    return exp, log, log1p, split


_exp, _, _log1p, _split = _elementary(
    np.float32,
    np.int32,
    _inline(lambda x: np.float32(x).view(np.int32)),
    _inline(lambda x: np.int32(x).view(np.float32)),
    n_exp=7,
    n_log=4,
)
_exp_double, _log_double, _log1p_double, _ = _elementary(
    np.float64,
    np.int64,
    _inline(lambda x: np.float64(x).view(np.int64)),
    _inline(lambda x: np.int64(x).view(np.float64)),
    n_exp=14,
    n_log=11,
)


# ---- A row of zeros ----------------------------------------------------------------------------------------


@_inline
def _exponentials(x, shift, result):
    for g in range(len(x)):
        result[g] = _exp(x[g] - shift)


@_inline
def _poisson_zeros(rho, total, zeros, d_mean):
    for g in range(len(rho)):
        zeros[g] = -total * rho[g]
        d_mean[g] = -total * rho[g]


@_inline
def _negative_binomial_zeros(rho, total, theta, zeros, d_mean, d_theta):
    one = np.float32(1)
    for g in range(len(rho)):
        ratio = total * rho[g] / theta[g]
        zeros[g] = _log1p(ratio)
        d_theta[g] = ratio / (one + ratio)
    for g in range(len(rho)):  # apart, as a loop over more arrays would not be vectorised
        d_mean[g] = -theta[g] * d_theta[g]
        d_theta[g] -= zeros[g]
        zeros[g] *= -theta[g]


@_inline
def _inflate_zeros(gate, zeros, d_mean, d_theta, d_gate, counted):
    least, one = np.float32(_LEAST_GATE), np.float32(1)
    for g in range(len(gate)):
        logit = least if gate[g] < least else gate[g]
        odds = _exp(zeros[g] - logit)
        dropout, dropped = one / (one + _exp(-logit)), one / (one + odds)
        zeros[g] = (one + odds) * dropout
        d_gate[g] = dropped - dropout
        counted[g] = odds * dropped
    for g in range(len(gate)):
        d_mean[g] *= counted[g]
        d_theta[g] *= counted[g]


@_inline
def _subtract(x, factor, result):
    for g in range(len(x)):
        result[g] -= factor * x[g]


@njit(fastmath={"reassoc"})  # in any order, or else it would be one addition after the other
def _sum(values):
    total = 0.0
    for k in range(len(values)):
        total += values[k]
    return total


@njit(fastmath={"reassoc"})
def _product(factors):
    """Return the product of a few positive numbers, ``2^n f``: `n` and `f`."""
    n, f = np.int32(0), np.float32(1)
    for k in range(len(factors)):
        n_k, f_k = _split(factors[k])
        n += n_k
        f *= f_k
    return n, f


@_inline
def _sum_of_logs(values):
    """Add logarithms up by taking those of products of 128 numbers, each from root 1/2 to root 2 but for its power."""
    total = 0.0
    for first in range(0, len(values), _N_FACTORS):
        n, f = _product(values[first : first + _N_FACTORS])
        total += n * math.log(2) + math.log(f)
    return total


# ---- Non-zeros: in the place of the count its term, in that of a parameter the slope in it -------------------


@_inline
def _poisson_terms(x, log_mean):
    for k in range(len(x)):
        mean = _exp_double(log_mean[k])
        x[k], log_mean[k] = x[k] * log_mean[k] - mean, x[k] - mean


@_inline
def _negative_binomial_terms(x, log_mean, theta):
    """Take differences from `theta` to `theta + x`, with few divisions; see `_lgamma_digamma` of the counts."""
    for k in range(len(x)):
        z, z_x = theta[k], theta[k] + x[k]
        q, q_x = z * (z + 3), z_x * (z_x + 3)
        product, product_x = q * (q + 2), q_x * (q_x + 2)
        both, both_products = 1 / ((z + 4) * (z_x + 4)), 1 / (product * product_x)
        i, i_x = both * (z_x + 4), both * (z + 4)
        inverse, inverse_x = both_products * product_x, both_products * product
        inverse_z = inverse * (z + 3) * (q + 2)
        log_w = _log1p_double(x[k] * i)
        lgamma = (z_x + 3.5) * log_w - x[k] + _stirling(i_x) - _stirling(i) - _log_double(product_x * inverse)
        digamma = log_w + _stirling_slope(i_x) - _stirling_slope(i)
        digamma += 4 * ((q + 1) * (z + 1.5) * inverse - (q_x + 1) * (z_x + 1.5) * inverse_x)
        mean = _exp_double(log_mean[k])
        ratio = mean * inverse_z
        log1p_ratio = _log1p_double(ratio)
        slope = (x[k] - mean) / (1 + ratio)
        x[k] = x[k] * (log_mean[k] + _log_double(1 + 4 * inverse_z)) - z_x * log1p_ratio + lgamma
        log_mean[k], theta[k] = slope, digamma - log1p_ratio - slope * inverse_z


@_inline
def _stirling(i):
    i2 = i * i
    return i * (1 / 12 + i2 * (-1 / 360 + i2 * (1 / 1260 - i2 / 1680)))


@_inline
def _stirling_slope(i):
    i2 = i * i
    return i2 * (-1 / 12 + i2 * (1 / 120 + i2 * (-1 / 252 + i2 / 240))) - 0.5 * i


@_inline
def _inflate_terms(gate, term, counted):
    one = np.float32(1)
    for k in range(len(gate)):
        odds = _exp(-gate[k])
        counted[k] = -gate[k] - _log1p(odds)
        gate[k] = -one / (one + odds)
    for k in range(len(gate)):
        term[k] += counted[k]


# ---- All -----------------------------------------------------------------------------------------------------


@_kept
def log_prob(log_mean, log_total, highest, theta, gate, x, cell, gene, result, d_mean, d_total, d_theta, d_gate):
    """Add the log density of each cell to `result`, ``[n]``, but for ``log(x!)``, and write its gradients.

    Parameters
    ----------
    log_mean
        ``[n, G]``, single precision, like all matrices; with `log_total` not of the means, but of numbers that are in
        proportion to them.
    log_total, highest
        Logarithm of the sum of the means of each cell, and the highest `log_mean` of each, ``[n]``; or ``[0]``.
    theta
        ``[n, G]``, ``[1, G]`` or, for Poisson, ``[0, G]``.
    gate
        ``[n, G]``, or ``[0, G]`` where there is none.
    x, cell, gene
        The non-zeros and where they are, int64; row by row, those of a cell `n` at the end counting nothing.
    result, d_total
        ``[n]``, double and single precision; the latter with `log_total` only.
    d_mean, d_theta, d_gate
        Gradients in `log_mean`, `theta` and `gate`, ``[n, G]``; or ``[1, G]``, of which nothing is expected.
    """
    n, n_genes = log_mean.shape
    rho, zeros = np.empty(n_genes, np.float32), np.empty(n_genes, np.float32)
    counted = np.empty(max(n_genes, _BLOCK), np.float32)
    block, genes, gates = np.empty((3, _BLOCK)), np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.float32)
    k, none, one = 0, np.float32(0), np.float32(1)

    for i in range(n):
        log_mean_i, d_mean_i = log_mean[i], d_mean[i % len(d_mean)]
        d_theta_i, d_gate_i = d_theta[i % len(d_theta)], d_gate[i % len(d_gate)]
        total, shift, inverse = one, 0.0, 0.0
        if len(log_total):
            _exponentials(log_mean_i, highest[i], rho)
            inverse = 1 / _sum(rho)
            total = np.float32(math.exp(log_total[i]) * inverse)
            shift = log_total[i] - highest[i] + math.log(inverse)
        else:
            _exponentials(log_mean_i, none, rho)
        if len(theta):
            _negative_binomial_zeros(rho, total, theta[i % len(theta)], zeros, d_mean_i, d_theta_i)
        else:
            _poisson_zeros(rho, total, zeros, d_mean_i)
        if len(gate):
            _inflate_zeros(gate[i], zeros, d_mean_i, d_theta_i, d_gate_i, counted)

        while k < len(cell) and cell[k] == i:
            m = 0
            while m < _BLOCK and k < len(cell) and cell[k] == i:
                g = gene[k]
                if not 0 <= g < n_genes:
                    raise IndexError("A non-zero has a gene that there is not.")
                genes[m] = g
                zeros[g] = one if len(gate) else none
                block[0, m], block[1, m] = x[k], log_mean_i[g] + shift
                if len(theta):
                    block[2, m] = theta[i % len(theta), g]
                if len(gate):
                    gates[m] = max(gate[i, g], np.float32(_LEAST_GATE))
                k += 1
                m += 1
            if len(theta):
                _negative_binomial_terms(block[0, :m], block[1, :m], block[2, :m])
            else:
                _poisson_terms(block[0, :m], block[1, :m])
            if len(gate):
                _inflate_terms(gates[:m], block[0, :m], counted)
            result[i] += _sum(block[0, :m])
            for j in range(m):
                d_mean_i[genes[j]] = block[1, j]
                d_theta_i[genes[j]] = block[2, j]
                d_gate_i[genes[j]] = gates[j]
        result[i] += _sum_of_logs(zeros) if len(gate) else _sum(zeros)
        if len(log_total):  # through the normalisation
            d_total[i] = _sum(d_mean_i)
            _subtract(rho, np.float32(d_total[i] * inverse), d_mean_i)
    if k < len(cell) and cell[k] < n:
        raise ValueError("The non-zeros are not in the order of their cells.")


@_kept
def take_rows(values, genes, offsets, rows):
    """Return the non-zeros of some rows of a CSR matrix: values, row among `rows`, column; each ``[n_nonzero]``.

    And where those of each row begin, and those of the last end. The values are returned in single precision, whatever
    they are of.
    """
    n_nonzero, ends = 0, np.zeros(len(rows) + 1, np.int64)
    for i in range(len(rows)):
        row = rows[i]
        if not 0 <= row < len(offsets) - 1:
            raise IndexError("A row is asked for that there is not.")
        n_nonzero += offsets[row + 1] - offsets[row]
        ends[i + 1] = n_nonzero
    taken, cell, gene = np.empty(n_nonzero, np.float32), np.empty(n_nonzero, np.int64), np.empty(n_nonzero, np.int64)
    k = 0
    for i in range(len(rows)):
        for j in range(offsets[rows[i]], offsets[rows[i] + 1]):
            taken[k], cell[k], gene[k] = values[j], i, genes[j]
            k += 1
    return taken, cell, gene, ends


@_kept
def by_column(columns, offsets, values, n_columns):
    """Return a CSR matrix column by column: offsets of the columns, ``[n_columns + 1]``, rows and values.

    What lies after the last row is left out.
    """
    ends, n_nonzero = np.zeros(n_columns + 1, np.int64), offsets[-1]
    for column in columns[:n_nonzero]:
        if not 0 <= column < n_columns:
            raise IndexError("A non-zero has a column that there is not.")
        ends[column + 1] += 1
    for column in range(n_columns):
        ends[column + 1] += ends[column]
    free = ends.copy()
    rows, sorted_values = np.empty(n_nonzero, np.int64), np.empty(n_nonzero, values.dtype)
    for row in range(len(offsets) - 1):
        for k in range(offsets[row], offsets[row + 1]):
            place = free[columns[k]]
            rows[place], sorted_values[place] = row, values[k]
            free[columns[k]] = place + 1
    return ends, rows, sorted_values


def are_compiled() -> bool:
    """Tell whether the loops were compiled before, in this process or by an earlier one that kept them on disk."""

    def is_compiled(loop: Any) -> bool:
        loop = loop.__wrapped__
        if loop.signatures:
            return True
        folder, source = loop.stats.cache_path, Path(__file__)
        kept = [] if folder is None else Path(folder).glob(f"{source.stem}.{loop.py_func.__name__}-*.nbi")
        return any(file.stat().st_mtime >= source.stat().st_mtime for file in kept)

    return all(map(is_compiled, (log_prob, take_rows, by_column)))
