"""What each part of a run did, in a sentence: when its terms learned, how scores moved meanwhile, its own rewards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

LOSS, REWARD, SKIPPED = "/loss", "/reward", "skipped"
NORM = "/x0_norm"
"""Of the images drawn: it tells draws apart whose rewards are the same."""
FEWEST_DRAWS = 6
"""With fewer, a third of them is one draw, and nothing can be said of chance."""


@dataclass(frozen=True)
class Draws:
    """The mean reward of each draw that these terms learned from."""

    terms: tuple[str, ...]
    rewards: tuple[float, ...]

    @property
    def thirds(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The rewards of the first third of the draws, and of the last."""
        count = len(self.rewards) // 3
        return self.rewards[:count], self.rewards[-count:]

    def __str__(self) -> str:
        """The last third against the first, with Welch's 95 % interval; the draws are taken as independent."""
        first, last = self.thirds
        before, after = sum(first) / len(first), sum(last) / len(last)
        low, high = _welch(first, last)
        verb = "rose" if low > 0 else "fell" if high < 0 else "did not clearly move"
        return (
            f"the reward of the images drawn for {_listed(self.terms)} {verb}, {before:.4g} to {after:.4g} (last third "
            f"of {len(self.rewards)} draws minus the first: {after - before:+.4g} [{low:+.4g}, {high:+.4g}])"
        )


def _welch(first: Sequence[float], last: Sequence[float]) -> tuple[float, float]:
    """The interval of mean(last) - mean(first); the difference itself where nothing varies."""
    if len(set(first)) == len(set(last)) == 1:
        return (last[0] - first[0],) * 2
    from scipy import stats  # here: it takes most of a second, and few runs draw

    found = stats.ttest_ind(last, first, equal_var=False).confidence_interval(0.95)
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class Phase:
    """Steps `first` to `last`, in which these terms learned side by side or in turn; `end` is where the next begins."""

    terms: tuple[str, ...]
    first: int
    last: int
    end: int
    draws: tuple[Draws, ...] = ()


@dataclass
class _Term:
    """The steps in which a term learned, and its draws: the reward, and all that is known of it."""

    first: int
    last: int
    drawn: list[tuple[float, tuple[Any, ...]]] = field(default_factory=list)

    def note(self, step: int, name: str, row: Mapping[str, Any]) -> None:
        self.last = step
        figures = tuple(value for key, value in row.items() if key.startswith((name + REWARD, name + NORM)))
        reward = row.get(name + REWARD)
        # A draw that several steps learn from stands in each of their rows.
        if isinstance(reward, int | float) and not (self.drawn and self.drawn[-1][1] == figures):
            self.drawn.append((float(reward), figures))


def phases(rows: Sequence[Mapping[str, Any]]) -> list[Phase]:
    """The parts of a run by the rows of its metrics.jsonl: terms whose steps overlap are in one."""
    terms: dict[str, _Term] = {}
    for row in rows:
        names = [key.removesuffix(LOSS) for key in row if key.endswith(LOSS) and key.count("/") == 1]
        for name in names if SKIPPED not in row else ():
            if f"{name}/{SKIPPED}" not in row:
                terms.setdefault(name, _Term(row["step"], row["step"])).note(row["step"], name, row)
    found: list[Phase] = []
    for name, term in sorted(terms.items(), key=lambda item: item[1].first):
        if found and term.first <= found[-1].last:
            last = max(found[-1].last, term.last)
            found[-1] = replace(found[-1], terms=(*found[-1].terms, name), last=last, end=last)
        else:
            found.append(Phase((name,), term.first, term.last, term.last))
    if not found:
        return []
    ends = [*(after.first - 1 for after in found[1:]), rows[-1]["step"]]
    return [replace(phase, end=end, draws=_draws(phase, terms)) for phase, end in zip(found, ends, strict=True)]


def _draws(phase: Phase, terms: Mapping[str, _Term]) -> tuple[Draws, ...]:
    """The draws of a phase; terms that learn from one source have the same."""
    by_rewards: dict[tuple[float, ...], tuple[str, ...]] = {}
    for name in phase.terms:
        rewards = tuple(reward for reward, _ in terms[name].drawn)
        if len(rewards) >= FEWEST_DRAWS:
            by_rewards[rewards] = (*by_rewards.get(rewards, ()), name)
    return tuple(Draws(names, rewards) for rewards, names in by_rewards.items())


def story(found: Sequence[Phase], scores: Mapping[int, Mapping[str, float]]) -> str | None:
    """A sentence on a run of several terms, or of one with rewards; None for others.

    `scores` are those of evaluations by their step, with 0 for the base; a phase has some if both its ends do.
    """
    if len({name for phase in found for name in phase.terms}) < 2 and not any(phase.draws for phase in found):
        return None
    parts, begin = [], 0
    for phase in found:
        before, after = scores.get(begin, {}), scores.get(phase.end, {})
        moved = [f"{name} {before[name]:.4g} -> {value:.4g}" for name, value in after.items() if name in before]
        learned = f"{_listed(phase.terms)} learned in steps {phase.first} to {phase.last}"
        parts.append(
            " and ".join([f"{learned}, with {', '.join(moved)}" if moved else learned, *map(str, phase.draws)])
        )
        begin = phase.end
    return "; ".join(parts)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 2 else names)
