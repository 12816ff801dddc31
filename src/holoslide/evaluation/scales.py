"""How the scores of a heatmap become colours, ticks and a line of numbers.

Scores of cells span orders of magnitude: one cell may hold most of a slide's answer beside hundreds that say next
to nothing. So scales are logarithmic and end at the true extremes: no two cells of different weight look alike
because a colour ran out. What is drawn is a display of the scores; the scores stay in the arrays they came in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from numpy.typing import NDArray

# Both run evenly in lightness and are told apart in every common kind of colour blindness.
SEQUENTIAL, DIVERGING = "viridis", "PuOr_r"
# All cells with less than this of the average attention hold less than a thousandth of it together.
_FAINT = 1e-3
_MOST = 0.9  # the share that a line of numbers counts the fewest cells for
_CHARACTERS = 40  # of a tick's label, side by side, are about as wide as a legend


@dataclass(frozen=True, slots=True)
class Scale:
    """How values become colours: from `low` to `high`, beyond which the colour stays.

    Logarithmic; with a `linear_width` symmetrically so, arcsinh(value / linear_width): linear for values up to
    about that width, logarithmic beyond, with a place for zero and both signs. `ticks` are (value, label) for the
    legend, the most important first, `unit` says in words what is measured.
    """

    low: float
    high: float
    colours: str
    unit: str
    ticks: tuple[tuple[float, str], ...]
    linear_width: float | None = None

    def position(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """0 at `low`, 1 at `high`, clipped; NaN stays NaN."""
        low, high = self._bent(np.array([self.low, self.high]))
        result: NDArray[np.float64] = np.clip((self._bent(values) - low) / (high - low), 0.0, 1.0)
        return result

    def values(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """What stands at positions from 0 to 1: the inverse of `position`."""
        low, high = self._bent(np.array([self.low, self.high]))
        bent = low + positions * (high - low)
        result: NDArray[np.float64] = (
            np.exp(bent) if self.linear_width is None else self.linear_width * np.sinh(bent)
        )
        return result

    def colour(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """RGB of each value, 0 to 255; that of NaN means nothing."""
        table = matplotlib.colormaps[self.colours](np.linspace(0, 1, 256))[:, :3] * 255
        place = np.nan_to_num(self.position(values)) * 255
        result: NDArray[np.float64] = table[np.rint(place).astype(np.intp)]
        return result

    def strip(self, length: int = 256) -> NDArray[np.float64]:
        """The legend's colours from low to high, (1, length, 3), 0 to 255."""
        return self.colour(self.values(np.linspace(0, 1, length)))[None]

    def tick_places(self) -> tuple[tuple[float, str], ...]:
        """(position from 0 to 1, label) from low to high, of those ticks whose labels find room."""
        places = self.position(np.array([value for value, _ in self.ticks])).tolist()
        kept: list[tuple[float, str]] = []
        taken: list[tuple[float, float]] = []
        for place, (_, label) in zip(places, self.ticks, strict=True):
            width = (len(label) + 1) / _CHARACTERS
            left = min(max(place - width / 2, 0.0), 1.0 - width)  # labels at the ends stay within the legend
            if all(left + width <= start or end <= left for start, end in taken):
                kept.append((place, label))
                taken.append((left, left + width))
        return tuple(sorted(kept))

    def _bent(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.linear_width is None:
            return np.log(np.maximum(values, self.low))
        return np.arcsinh(values / self.linear_width)


def relative_attention(attention_HW: NDArray[np.floating]) -> NDArray[np.float64]:
    """Attention times the number of voting cells: 1 is what a cell gets on average; NaN where none votes."""
    values = attention_HW.astype(np.float64)
    voting = values[np.isfinite(values)]
    total = float(voting.sum())
    return values * (len(voting) / total) if total > 0 else values


def evidence_for(evidence_LHW: NDArray[np.floating], target: int) -> NDArray[np.float64]:
    """What each cell adds to the logit of class `target` above the mean of the other classes' logits.

    A softmax does not see what is added to all its logits alike, so evidence counts only against the others.
    With two classes this is the evidence for the log-odds.
    """
    values = evidence_LHW.astype(np.float64)
    others = np.delete(values, target, axis=0)
    result: NDArray[np.float64] = values[target] - (others.mean(axis=0) if len(others) else 0.0)
    return result


def attention_scale(relative: Sequence[NDArray[np.float64]]) -> Scale:
    """One logarithmic scale for these slides, from their weakest cell to their strongest.

    At least from half to twice the average, so that differences of nothing are not stretched.
    """
    voting = np.concatenate([np.ones(1), *(values[np.isfinite(values)] for values in relative)])
    weakest, high = float(voting.min()), max(2.0, float(voting.max()))
    low = min(0.5, max(weakest, _FAINT))
    faintest = f"{'≤ ' if weakest < _FAINT else ''}{_digits(low)} ×"
    tens = [(value, f"{_digits(value)} ×") for value in _powers_of_ten(low, high)]
    ticks = ((low, faintest), (high, f"{_digits(high)} ×"), (1.0, "1 ×"), *tens)
    whose = "one scale for all slides here" if len(relative) > 1 else "this slide's own scale"
    return Scale(low, high, SEQUENTIAL, f"times the average cell's attention; {whose}", ticks)


def evidence_scale(evidence_HW: NDArray[np.floating], target: str) -> Scale:
    """A slide's own symmetric logarithmic scale, which ends at its strongest cell.

    It is linear up to the mean size of the cells' evidence: what each would add if all added alike.
    """
    size = np.abs(_voting(evidence_HW))
    limit = float(size.max()) if size.any() else 1.0
    width = float(size.mean()) if size.any() else 1.0
    tens = [value for one in reversed(_powers_of_ten(width, limit)) for value in (-one, one)]
    ticks = tuple((value, signed(value)) for value in (-limit, limit, 0.0, *tens))
    unit = f"evidence for {target} above the others, in logits per cell; this slide's own scale"
    return Scale(-limit, limit, DIVERGING, unit, ticks, linear_width=width)


def attention_sums(relative_HW: NDArray[np.float64]) -> str:
    """How attention adds up: what the strongest cell holds, and how few hold most of it."""
    values = _voting(relative_HW)
    if not values.any():
        return ""
    share = 100 * float(values.max() / values.sum())
    return (
        f"The strongest of {len(values):,} cells holds {_digits(share, 2)} % of all attention; "
        f"{_fewest(values):,} hold {100 * _MOST:.0f} %."
    )


def evidence_sums(evidence_HW: NDArray[np.floating]) -> str:
    """How evidence adds up: the sum, what speaks for and against, the strongest cell, and how few hold most.

    >>> evidence_sums(np.array([[7.6, -0.3, -0.2, 0.1, np.nan]]))
    '4 cells add up to +7.2: +7.7 for, −0.5 against. The strongest adds +7.6; 1 holds 90 % of what is said.'
    """
    values = _voting(evidence_HW)
    if not values.any():
        return ""
    strongest, most = float(values[np.abs(values).argmax()]), _fewest(np.abs(values))
    both = float(values[values > 0].sum()), float(values[values < 0].sum())
    return (
        f"{len(values):,} cells add up to {signed(sum(both))}: {signed(both[0])} for, {signed(both[1])} against. "
        f"The strongest adds {signed(strongest)}; {most:,} {'holds' if most == 1 else 'hold'} "
        f"{100 * _MOST:.0f} % of what is said."
    )


def signed(value: float) -> str:
    """Three digits and a sign.

    >>> signed(7.6534), signed(-0.00123), signed(0.0)
    ('+7.65', '−0.00123', '0')
    """
    sign = "+" if value > 0 else "−" if value < 0 else ""
    return sign + _digits(abs(value))


def _digits(value: float, digits: int = 3) -> str:
    """Three significant digits, without an exponent for large numbers.

    >>> _digits(392.61), _digits(12345.0), _digits(0.0619)
    ('393', '12,300', '0.0619')
    """
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def _powers_of_ten(low: float, high: float) -> list[float]:
    """
    >>> _powers_of_ten(0.03, 20)
    [0.1, 1.0, 10.0]
    """
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    return [float(f"1e{exponent}") for exponent in range(first, last + 1)]


def _voting(values_HW: NDArray[np.floating]) -> NDArray[np.float64]:
    voting: NDArray[np.float64] = values_HW[np.isfinite(values_HW)].astype(np.float64)
    return voting


def _fewest(sizes: NDArray[np.float64]) -> int:
    """How few cells hold most of all."""
    held = np.cumsum(np.sort(sizes)[::-1])
    return int(np.searchsorted(held, _MOST * held[-1] * (1 - 1e-9))) + 1
