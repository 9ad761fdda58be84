"""The study's primary endpoints, computed a second time from the judge's verdict on each picture.

The arithmetic is written from docs/report.md ("How certain it is", "Primary endpoints") and shares no code with the
package: a mistake in one of the two shows.
"""

import json
import re
import shutil
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from agsm_rl.report.endpoints import answers
from agsm_rl.report.runs import read_runs

STUDY = Path(__file__).parents[2] / "docs" / "study"
# Those committed before their runs. `questions.yaml` was named afterwards, and its nine archives take long to read.
FILES = ["two_axes_questions.yaml", "scenes_questions.yaml"]


def sweeps_of(file):
    """The sweeps that a file's endpoints are about."""
    endpoints = yaml.safe_load(file.read_text(encoding="utf-8"))["endpoints"]
    elsewhere = {one["minus"].split("/")[0] for one in endpoints if "/" in one.get("minus", "")}
    return {one["sweep"] for one in endpoints} | elsewhere


def have_run(name):
    return all((STUDY / f"{sweep}.tar.xz").is_file() for sweep in sweeps_of(STUDY / name))


@pytest.mark.parametrize("name", [name for name in FILES if have_run(name)])
def test_a_second_computation_of_the_endpoints_gives_the_same_figures(name, tmp_path):
    file = Path(shutil.copy(STUDY / name, tmp_path))
    for sweep in sweeps_of(file):
        with tarfile.open(STUDY / f"{sweep}.tar.xz") as archive:
            archive.extractall(tmp_path, filter="data")
    asked = yaml.safe_load(file.read_text(encoding="utf-8"))
    ours = [answer_of(endpoint, tmp_path) for endpoint in asked["endpoints"]]
    adjusted = holm([figures[-1] for figures in ours], asked.get("questions", len(ours)))
    for figures, p, told in zip(ours, adjusted, answers(file, read=cache(read_runs)), strict=True):
        change = told.change
        theirs = [told.seeds, change.value, change.low, change.high, change.p_value, told.holm]
        np.testing.assert_allclose([*figures, p], theirs, rtol=1e-9, atol=1e-12, err_msg=told.endpoint.question)


def answer_of(endpoint, study):
    """The number of seeds, the difference, its lower and upper limit, and its p-value."""
    arm = pictures_of(endpoint["variant"], endpoint, study)
    rival = pictures_of(endpoint.get("minus", endpoint["variant"]), endpoint, study, base="minus" not in endpoint)
    seeds = sorted(arm.keys() & rival.keys())
    assert len(seeds) >= max(endpoint.get("seeds", 2), 2)
    prompts = [(picture["tag"], picture["prompt"]) for picture in arm[seeds[0]]]
    for seed in seeds:
        assert [(one["tag"], one["prompt"]) for one in arm[seed]] == prompts
        assert [(one["tag"], one["prompt"]) for one in rival[seed]] == prompts

    score = endpoint.get("score", "strict")
    is_reward = score not in arm[seeds[0]][0]
    changes = np.array([worth(arm[seed], score) - worth(rival[seed], score) for seed in seeds])
    tags = np.array([tag for tag, _ in prompts])
    groups = [tags == tag for tag in sorted(set(tags))]
    if is_reward:
        groups = [np.full(len(tags), True)]
    if "tag" in endpoint:
        groups = [tags == endpoint["tag"]]
    requirements = np.array([" | ".join((tag, *asked_for(prompt))) for tag, prompt in prompts])
    # A share counts pictures; a reward is a mean over prompts, of which some are drawn more often than others.
    weights = np.array([1 / prompts.count(one) if is_reward else 1 for one in prompts])
    mean, low, high, p = crossed([of_one_tag(changes[:, at], requirements[at], weights[at]) for at in groups])
    return (len(seeds), mean, low, high, p) if is_reward else (len(seeds), mean, max(low, -1), min(high, 1), p)


def of_one_tag(changes, requirements, weights):
    """The mean by seed; its variance by requirements, and by what is left, each with its degrees of freedom."""
    seeds, names = len(changes), sorted(set(requirements))
    belongs = np.array([[one == name for one in requirements] for name in names]) * weights / weights.sum()
    share = belongs.sum(axis=1)
    cells = changes @ belongs.T / share  # the mean change of each requirement in each seed
    by_seed, by_requirement = cells @ share, cells.mean(axis=0)
    left = cells - by_requirement - by_seed[:, None] + by_seed.mean()
    free = len(names) - 1
    between = len(names) / free * np.sum((share * (by_requirement - by_seed.mean())) ** 2)
    both = len(names) / free * np.sum((share * left) ** 2) / (seeds * (seeds - 1))
    return by_seed, (between, free), (both, free * (seeds - 1))


def crossed(tags):
    """The mean over tags, its 95 % interval over requirements and seeds, and its p-value."""
    by_seed = np.mean([means for means, _, _ in tags], axis=0)
    parts = [(part / len(tags) ** 2, free) for _, *both in tags for part, free in both]
    of_requirements, left = (sum(part for part, _ in parts[kind::2]) for kind in (0, 1))
    of_seeds = by_seed.var(ddof=1) / len(by_seed)
    parts.append((of_seeds, len(by_seed) - 1))
    variance = left + max(of_seeds - left, 0) + max(of_requirements - left, 0)
    df = variance**2 / sum(part**2 / free for part, free in parts)
    df = max(df, min(free for part, free in parts if part > 1e-20))  # a smaller one is rounding
    mean, error = by_seed.mean(), variance**0.5
    low, high = stats.t.interval(0.95, df, mean, error)
    return mean, low, high, 2 * stats.t.sf(abs(mean) / error, df)


def holm(p_values, questions):
    """The smallest p-value is multiplied by the number of questions, the next by one less; none falls below another."""
    adjusted, before = {}, 0.0
    for rank, place in enumerate(np.argsort(p_values)):
        before = adjusted[place] = max(before, min(1.0, (questions - rank) * p_values[place]))
    return [adjusted[place] for place in range(len(p_values))]


def asked_for(prompt):
    """What a prompt asks for, however it is worded: a circle below a star is a star above a circle."""
    words = re.sub("^an? (photo|picture|drawing) of ", "", prompt).replace(" to the ", " ").replace(" of ", " ")
    for relation, reverse in {"left": "right", "above": "below"}.items():
        if parts := re.fullmatch(f"(.+) ({relation}|{reverse}) (.+)", words):
            one, word, other = parts.groups()
            return (relation, one, other) if word == relation else (relation, other, one)
    return tuple(sorted(words.split(" and ")))


def pictures_of(name, endpoint, study, base=False):
    """A variant's judged pictures by seed, or the base's beside them."""
    sweep, _, variant = name.rpartition("/")
    cells = study / (sweep or endpoint["sweep"]) / "cells"
    drawn = evaluations(cells, variant, "eval.json", base)
    validated = evaluations(cells, variant, "eval-validation.json", base)
    measured = sorted(next(iter(drawn.values())))
    guidance = endpoint.get("guidance", "own" if validated else measured[0])
    if guidance == "own":
        scores = {one: np.mean([mean_over_tags(by[one]) for by in validated.values()]) for one in measured}
        guidance = max(measured, key=scores.__getitem__)
    return {seed: by_guidance[guidance] for seed, by_guidance in drawn.items()}


def evaluations(cells, variant, name, base):
    """The judged pictures of each seed by guidance."""
    found = {}
    for file in cells.glob(f"{variant}-seed*/{name}"):
        first = json.loads(file.read_text(encoding="utf-8"))
        each = [first, *first.get("other_guidances", [])]
        of_seed = {one["guidance"]: (one["base"] if base else one)["images"] for one in each}
        found[int(file.parent.name.rpartition("-seed")[2])] = of_seed
    return found


def mean_over_tags(pictures):
    verdicts = {}
    for one in pictures:
        verdicts.setdefault(one["tag"], []).append(one["strict"])
    return np.mean([np.mean(of_tag) for of_tag in verdicts.values()])


def worth(pictures, score):
    return np.array([float(one[score] if score in one else one["rewards"][score]) for one in pictures])
