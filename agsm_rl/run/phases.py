"""A sentence on each part of a run: when its terms learned, how scores moved meanwhile, and its own rewards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agsm_rl.evaluate.intervals import Interval
from agsm_rl.report.eval_rows import Score
from agsm_rl.report.texts import change_text

LOSS, REWARD, SKIPPED = "/loss", "/reward", "skipped"
NORM = "/x0_norm"
"""Of the images drawn: it tells draws apart whose rewards are the same."""
FEWEST_DRAWS = 6
"""With fewer, a third of them is one draw, and nothing can be said of chance."""
ROUNDING = 1e-6
"""Two ways to the same mean differ by less than this share of it."""


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


def story(
    found: Sequence[Phase],
    scores: Mapping[int, Mapping[str, float]],
    changes: Callable[[int, int], Mapping[str, Interval]] = lambda begin, end: {},
) -> list[str]:
    """A sentence per part of a run of several terms, or of one with rewards; none of others.

    Args:
        found: The parts.
        scores: Those of evaluations by their step, with 0 for the base; a phase has some if both its ends do.
        changes: The paired intervals of what scores changed by between two of these steps, as far as they are known.
    """
    if len({name for phase in found for name in phase.terms}) < 2 and not any(phase.draws for phase in found):
        return []
    sentences, begin = [], 0
    for phase in found:
        before, after = scores.get(begin, {}), scores.get(phase.end, {})
        names = [name for name in after if name in before]
        known = changes(begin, phase.end) if names else {}
        moved = [_moved(name, before[name], after[name], known.get(name)) for name in names]
        learned = f"{_listed(phase.terms)} learned in steps {phase.first} to {phase.last}"
        sentences.append(
            " and ".join([f"{learned}, with {', '.join(moved)}" if moved else learned, *map(str, phase.draws)])
        )
        begin = phase.end
    return sentences


def _moved(name: str, before: float, after: float, change: Interval | None) -> str:
    """A score at both ends, and its change with the interval."""
    ends, rounding = f"{name} {before:.4g} -> {after:.4g}", ROUNDING * max(abs(before), abs(after))
    # A score that is no mean of its images' figures changes by something else than they do.
    if change is None or abs(change.value - (after - before)) > rounding:
        return f"{ends} (no interval)"
    verdict = "" if change.excludes_zero else ", not told apart"
    return f"{ends} ({change_text(Score(name, share=False), change)}{verdict})"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 2 else names)
