"""What report.py says first: which setting is better, and whether codes kept pace with latents. Plain words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

# As the trainer's advice has them, tokenizer/code_meter.py: beyond these, codes are behind.
UNUSED, CONTRACTED = 0.75, 1.5


class Scored(NamedTuple):
    """A setting: its number over seeds, None for the deviation of one seed."""

    name: str
    mean: float
    deviation: float | None
    usage: float | None  # mean fraction of codes used

    def number(self, unit: str) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.2f}"
        return f"{self.mean:.2f}{spread}{unit}"

    def codes(self) -> str:
        return "" if self.usage is None else f" with {100 * self.usage:.0f} % of its codes in use"


def verdict(settings: Sequence[Scored], measure: str, unit: str = "", higher_is_better: bool = True) -> str:
    """One sentence or two. settings: of one protocol, at least one."""
    ordered = sorted(settings, key=lambda s: -s.mean if higher_is_better else s.mean)
    best = ordered[0]
    said = f"{best.name}: {measure} {best.number(unit)}{best.codes()}."
    if len(ordered) == 1:
        return said + (" One seed." if best.deviation is None else "")
    second = ordered[1]
    difference = abs(best.mean - second.mean)
    said = (f"{best.name} has the best {measure}, {best.number(unit)}{best.codes()}; next is {second.name}, "
            f"{second.number(unit)}{second.codes()}.")
    if best.deviation is None or second.deviation is None:
        return said + " One seed on a side says little: no claim."
    if difference > best.deviation + second.deviation:
        return said + f" The difference of {difference:.2f}{unit} is more than both spreads over seeds together: clear."
    return said + f" The difference of {difference:.2f}{unit} is within the spreads over seeds: no clear winner."


def complaints(
    metrics: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]], since: int | None
) -> list[str] | None:
    """What is unhealthy about a run's codes since k-means; None: it has no codes yet, or did not record them.

    since: step of the last k-means; rows after it count. None: there was none; spreads of codes are those of a random
    start at first, or of a grid, and say nothing. metrics: rows with latent_spread, code_spread, codes_moved,
    latents_moved where recorded; validation: with usage.
    """
    metrics, validation = ([row for row in rows if row["step"] > (since or 0)] for rows in (metrics, validation))
    used = [row["usage"] for row in validation if _number(row.get("usage")) and row["usage"] > 0]
    spreads = _with(metrics, "latent_spread", "code_spread")
    if not used:
        return None
    found = []
    if used[-1] < UNUSED * max(used):
        found.append(f"codes in use fell from {100 * max(used):.0f} % to {100 * used[-1]:.0f} %")
    ends = (spreads[0], spreads[-1]) if since is not None and len(spreads) > 1 else ()
    if ends and all(row[key] > 0 for row in ends for key in ("latent_spread", "code_spread")):
        first, last = (row["code_spread"] / row["latent_spread"] for row in ends)
        if not 1 / CONTRACTED <= last / first <= CONTRACTED:
            found.append("the spread of the latents went from "
                         f"{spreads[0]['latent_spread']:.3g} to {spreads[-1]['latent_spread']:.3g}, that of the codes "
                         f"from {spreads[0]['code_spread']:.3g} to {spreads[-1]['code_spread']:.3g}")
    moving = _with(spreads, "codes_moved", "latents_moved")
    still = [0 < row["latents_moved"] >= 1e6 * row["codes_moved"] for row in moving]  # rounding is no move
    if since is not None and still and all(still):
        found.append("codes never moved while latents did")
    return found


def health(
    runs: Mapping[str, Sequence[tuple[str, list[str] | None, float | None]]], cures: Mapping[str, str],
    without_kmeans: Collection[str] = (),
) -> tuple[list[str], bool]:
    """Lines of the box, and whether all is well. runs: setting -> (run's name, `complaints`, last usage) each.

    cures: setting -> flag with its value to try next, where one is known. without_kmeans: settings whose codes have
    nothing to have kept pace since.
    """
    lines, well = [], True
    for name, found in runs.items():
        known = [(run, said, usage) for run, said, usage in found if said is not None]
        if not known:
            lines.append(f"{name}: no codes yet, or their use is not recorded.")
            continue
        used = sorted(100 * usage for _, _, usage in known if usage is not None)
        span = " to ".join(dict.fromkeys(f"{share:.0f}" for share in (*used[:1], *used[-1:]))) or "an unknown share"
        span += " %" if used else ""
        ill = [(run, "; ".join(said)) for run, said, _ in known if said]
        cure = f". Try {cures[name]}." if ill and name in cures else "."
        state = "" if name in without_kmeans else "; codes kept pace"
        state = f"; codes fell behind in {len(ill)} of {len(known)}" if ill else state
        lines.append(f"{name}: {span} of the codes in use{state}"
                     + "".join(f". {run}: {said}" for run, said in ill) + cure)
        well = well and not ill
    return lines, well


def _with(rows: Sequence[Mapping[str, Any]], *keys: str) -> list[Mapping[str, Any]]:
    """Those that have numbers there."""
    return [row for row in rows if all(_number(row.get(key)) for key in keys)]


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
