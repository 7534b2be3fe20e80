"""The cut: which units stay, so that the budget is hit to the channel."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..budget import Complexity
from .objective import Limits, Objective, best_of_group, first_ranks

CLOSE = 5e-3  # a gap below the budget that is left as it is
OVER = 9e-3  # what a cut may be above the budget, where structures are so coarse that none lies as near below
CORRECTIONS, TOLERANCE = 8, 2e-3  # cuts that are measured; relative distance to the budget at which that ends
TRIES, CHUNK = 5000, 256  # structures that are tried to close a larger one; in one pass over the cost model
CANDIDATE_TRIES = 32  # sets of candidates that are tried where widths alone cannot close it


def cut(
    objective: Objective, s: Tensor, floor: Sequence[int], measure: Callable[[Tensor], Complexity]
) -> Tensor:
    """What to keep: :func:`measured_cut` where there is a budget, :func:`exact_cut` to ratios."""
    return exact_cut(objective, s, floor) if objective.budget is None else measured_cut(objective, s, floor, measure)


def measured_cut(
    objective: Objective, s: Tensor, floor: Sequence[int], measure: Callable[[Tensor], Complexity]
) -> Tensor:
    """:func:`exact_cut`, with the cut network itself to say what it costs: bool ``[units]``.

    What the cost model cannot see (what nothing reads any more, the clock) is made up for by aiming lower or higher; of
    what is within OVER of the budget, or of what is not, that below it is preferred to what is nearer.

    Args:
        objective: costs and limits.
        s: what the units are worth, ``[units]``.
        floor: units that each group keeps at least.
        measure: what the network costs that keeps some units.
    """
    target = float(objective.targets[0])
    best: tuple[bool, bool, float, Tensor] | None = None
    aim, low, high = target, 0.0, math.inf  # low, high: aims that cost too little, and too much
    for _ in range(CORRECTIONS):
        units = exact_cut(objective, s, floor, aim)
        ratio = objective.measured(measure(units)) / target
        found = abs(ratio - 1) > OVER, ratio > 1 + TOLERANCE, abs(ratio - 1), units
        if best is None or found[:3] < best[:3]:
            best = found
        foreseen = abs(ratio * target / float(objective.relative(units.double())[0]) - 1) <= TOLERANCE
        if best[:3] <= (False, False, TOLERANCE) or (foreseen and 0 <= 1 - ratio <= CLOSE):
            break  # what is left of the gap is the structure's: another would be nearer, not better
        low, high = (max(low, aim), high) if ratio < 1 else (low, min(high, aim))
        aim = aim / ratio if low < aim / ratio < high else (low + high) / 2
    assert best is not None
    return best[3]


def exact_cut(objective: Objective, s: Tensor, floor: Sequence[int], target: float | None = None) -> Tensor:
    """The units to keep, bool ``[units]``: in the order of ``s``, as many as the budget allows, to the channel.

    At least ``floor`` units of each group of channels stay, and one candidate of every choice. The threshold leaves a
    gap smaller than one unit (than one multiple, where channels go by multiples); what is next in rank and still fits
    closes it, or blocks that change places.

    Args:
        objective: costs and limits.
        s: what the units are worth, ``[units]``.
        floor: units that each group keeps at least.
        target: fraction of the dense cost, instead of the budget's own (to correct for what the model cannot see).
    """
    s = s.detach().double().cpu()
    objective.to("cpu")
    floor = [0 if choice else count for count, choice in zip(floor, objective.choices)]
    keep = best_of_group(s, objective.group_of, first_ranks(objective.sizes, floor))
    blocks = _blocks(objective, s, floor)
    if objective.budget is None:
        room = (objective.targets * objective.pool_sizes).round().long()
        room -= torch.zeros_like(room).index_add(0, objective.owner, keep.long())
        for block in blocks:
            pool = objective.owner[block[0]]
            if room[pool] >= len(block):
                keep[block] = True
                room[pool] -= len(block)
        return keep
    limit = float(objective.targets[0]) if target is None else target

    def spent(mask: Tensor) -> float:
        return float(objective.relative(mask.double())[0])

    smallest = keep

    def best(count: int, above: float = 0.0) -> Tensor:
        """The first blocks, and the candidates that must stay at the price of the next one, or above it."""
        trial = smallest.clone()
        trial[torch.cat([*blocks[:count], torch.zeros(0, dtype=torch.int64)])] = True
        price = s[blocks[count]].mean() if count < len(blocks) else s.min()
        must, may = objective.candidates(s, price + above)
        return (trial | must) & may

    low, high = 0, len(blocks)
    while low < high:  # the most blocks that fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if spent(best(middle)) <= limit else (low, middle - 1)
    keep, above = best(low), 1e-3
    while spent(keep) > limit and above < 1e6:  # cheaper candidates, at a price that no unit is worth
        keep, above = best(0, above), 1.5 * above
    # which candidates are open is settled with the price
    rest = [block for block in blocks if not objective.choices[objective.group_of[block[0]]]]
    keep = _filled(objective, s, keep, rest, limit)
    if abs(limit - spent(keep)) > CLOSE * limit:
        keep = _with_other_candidates(objective, s, keep, rest, limit)
    if limit - spent(keep) > OVER * limit:
        keep = _traded(objective, s, keep, rest, limit)
    if limit - spent(keep) > OVER * limit:  # below the floors, where the structure has nothing nearer above them
        least = [0 if choice else count for count, choice in zip(objective.limits.least, objective.choices)]
        every = [b for b in _blocks(objective, s, least) if not objective.choices[objective.group_of[b[0]]]]
        keep = _closer(objective, s, keep, every, limit)
    return keep


def threshold_cut(s: Tensor, delta: float, thresholds: Sequence[float], limits: Limits, sizes: Sequence[int]) -> Tensor:
    """The units whose gate is over the threshold of its group, as many as the limits allow: bool ``[units]``."""
    parts = []
    for part, threshold, least, most in zip(s.split(list(sizes)), thresholds, limits.least, limits.most):
        count = int((torch.sigmoid(delta * part) > threshold).sum())
        keep = torch.zeros(len(part), dtype=torch.bool)
        keep[part.argsort(descending=True, stable=True)[: min(max(count, least), most)]] = True
        parts.append(keep)
    return torch.cat(parts)


def _with_other_candidates(
    objective: Objective, s: Tensor, keep: Tensor, rest: Sequence[Tensor], limit: float
) -> Tensor:
    """``keep`` with dearer candidates, and as many of the ``rest``, all of them channels, as then fit.

    Candidates are coarse: between two sets of them lie costs that no width of the smaller one reaches. The best-scored
    change of one candidate is made until there is a set whose channels can take the cost to the limit.
    """

    def spent(masks: Tensor) -> Tensor:
        return objective.relative(masks.double())[..., 0]

    def fitted(mask: Tensor) -> Tensor:
        trial = _without_the_last(objective, mask, rest, limit)
        return trial if float(spent(trial)) >= limit * (1 - CLOSE) else _filled(objective, s, trial, rest, limit)

    best, full = keep, keep.clone()
    full[torch.cat([*rest, torch.zeros(0, dtype=torch.int64)])] = True
    tries = CANDIDATE_TRIES
    while tries > 0:
        near = objective.neighbours(full)
        near = near[spent(near) > spent(full) * (1 + 1e-9)]
        near = near[((near.double() - full.double()) @ s).argsort(descending=True, stable=True)]
        if not len(near):
            break
        costs = spent(near)
        whole = near[costs <= limit]  # with all channels: the dearest of them is a cut already
        for mask in [*near[costs >= limit * (1 - CLOSE)][:tries], *whole[spent(whole).argsort()[-1:]]]:
            tries -= 1
            trial = fitted(mask)
            if spent(best) < spent(trial) <= limit:
                best = trial
            if spent(best) >= limit * (1 - CLOSE):
                return best
        full = near[0]
    return best


def _traded(objective: Objective, s: Tensor, keep: Tensor, rest: Sequence[Tensor], limit: float) -> Tensor:
    """``keep`` with one block more, dearer than what the limit leaves, and so many less of other groups as it takes.

    One unit of a residual stream may cost as much as hundreds of others. Of what comes as near as CLOSE the best sum of
    scores wins, or else the smallest gap.
    """
    found = [(True, limit - float(objective.relative(keep.double())[0]), keep)]
    for group in range(len(objective.sizes)):
        more = [block for block in rest if int(objective.group_of[block[0]]) == group and not bool(keep[block[0]])]
        if more:
            grown = keep.clone()
            grown[more[0]] = True
            others = [block for block in rest if int(objective.group_of[block[0]]) != group]
            trial = _without_the_last(objective, grown, others, limit)
            gap = limit - float(objective.relative(trial.double())[0])
            if gap >= 0:
                close = gap <= CLOSE * limit
                found.append((not close, -float(s[trial].sum()) if close else gap, trial))
    return min(found, key=lambda one: one[:2])[2]


def _without_the_last(objective: Objective, mask: Tensor, blocks: Sequence[Tensor], limit: float) -> Tensor:
    """``mask`` without so many of the ``blocks``, the last ones first, that it costs no more than the limit."""

    def without(count: int) -> Tensor:
        trial = mask.clone()
        trial[torch.cat([*blocks[len(blocks) - count :], torch.zeros(0, dtype=torch.int64)])] = False
        return trial

    def fits(count: int) -> bool:
        return float(objective.relative(without(count).double())[0]) <= limit

    return without(bisect.bisect_left(range(len(blocks)), True, key=fits))


def _filled(objective: Objective, s: Tensor, keep: Tensor, blocks: Sequence[Tensor], limit: float) -> Tensor:
    """``keep`` with what fits of the ``blocks``, all of them channels, so that it comes near to the limit."""

    def left() -> float:
        return limit - float(objective.relative(keep.double())[0])

    keep = keep.clone()
    full: set[int] = set()  # groups whose next block does not fit: a smaller one behind it would be no multiple
    for block in blocks:
        if left() < 5e-4 * limit:
            break
        group = int(objective.group_of[block[0]])
        if bool(keep[block[0]]) or group in full:
            continue
        keep[block] = True
        if left() < 0:
            keep[block] = False
            full.add(group)
    return _closer(objective, s, keep, blocks, limit) if left() > CLOSE * limit else keep


def _blocks(objective: Objective, s: Tensor, floor: Sequence[int]) -> list[Tensor]:
    """The units between each group's floor and its most, in blocks that go together, best mean score first."""
    blocks = []
    limits, offset = objective.limits, 0
    for size, least, most, multiple in zip(objective.sizes, floor, limits.most, limits.multiples):
        order = s[offset : offset + size].argsort(descending=True, stable=True) + offset
        blocks += list(order[least:most].split(multiple)) if most > least else []
        offset += size
    means = torch.stack([s[block].mean() for block in blocks]) if blocks else torch.zeros(0)
    return [blocks[i] for i in means.argsort(descending=True, stable=True).tolist()]


def _closer(objective: Objective, s: Tensor, keep: Tensor, blocks: Sequence[Tensor], limit: float) -> Tensor:
    """``keep`` with a block more or less in some groups, so that it comes nearer to the limit.

    Tries what one block more or less in any group gives, then two of these, and so on: at the first depth at which
    there is a gap of less than CLOSE, the best sum of scores wins; if there is none within TRIES, the smallest gap, or
    what is above the limit by less than OVER where that is nearer.
    """
    number = torch.where(keep, -1, len(blocks))  # of each unit's block in its group; -1: in the floor
    values = [[0.0] for _ in objective.sizes]
    counts = [0] * len(objective.sizes)
    for block in blocks:
        group = int(objective.group_of[block[0]])
        counts[group] += bool(keep[block[0]])
        number[block] = len(values[group]) - 1
        values[group].append(values[group][-1] + float(s[block].sum()))
    seen = {tuple(counts)}
    frontier, best, gap = [tuple(counts)], tuple(counts), math.inf
    above, over = tuple(counts), OVER * limit

    def units(states: Sequence[tuple[int, ...]]) -> Tensor:
        return number < torch.tensor(states)[:, objective.group_of]

    while frontier and len(seen) < TRIES:
        near = {
            (*state[:group], count, *state[group + 1 :])
            for state in frontier
            for group in range(len(counts))
            for count in (state[group] - 1, state[group] + 1)
            if 0 <= count < len(values[group])
        }
        frontier = sorted(near - seen)[:TRIES]
        seen |= near
        gaps: list[float] = []
        for i in range(0, len(frontier), CHUNK):
            gaps += (limit - objective.relative(units(frontier[i : i + CHUNK]).double())[:, 0]).tolist()
        close = [state for state, left in zip(frontier, gaps) if 0 <= left <= CLOSE * limit]
        if close:
            return units([max(close, key=lambda state: sum(v[n] for v, n in zip(values, state)))])[0]
        for state, left in zip(frontier, gaps):
            if 0 <= left < gap:
                best, gap = state, left
            elif 0 < -left < over:
                above, over = state, -left
    now = limit - float(objective.relative(keep.double())[0])
    if over < min(gap, now, OVER * limit):
        return units([above])[0]
    return units([best])[0] if gap < now else keep
