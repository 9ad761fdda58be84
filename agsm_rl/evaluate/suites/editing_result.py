"""The figures of the editing suite: shares of edits that changed, stayed, or both; means of rewards and structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.evaluate.figures import Scores, change_json, interval_json, number, plain_table, share_table
from agsm_rl.evaluate.intervals import Interval, mean_of, mean_over_prompts, paired_difference, wilson
from agsm_rl.evaluate.suite import Judged
from agsm_rl.run.screen import styled

SHARES = {
    "overall": "changed and kept: what should change, and nothing else",
    "changed": "changed: what the target prompt asks for is there",
    "kept": "kept: the rest is as and where it was",
}


@dataclass(frozen=True)
class EditingResult:
    """One model's edits. `split` is the shapes world's; None for a list, whose edits have no verdicts.

    `measures` are the names of the numbers in each row; `weights` those of the rewards among them.
    """

    judged: tuple[Judged, ...]
    measures: tuple[str, ...]
    weights: Mapping[str, float]
    split: str | None = None

    def scores(self) -> dict[str, Interval]:
        """The shares, of the shapes world, and the means."""
        shares = {name: self.shares(name).overall for name in SHARES} if self.split else {}
        return shares | {name: self.mean(name) for name in self.measures}

    def per_image(self) -> dict[str, list[float]]:
        """The measures of each edit."""
        return {name: [float(item.row[name]) for item in self.judged] for name in self.measures}

    def shares(self, name: str) -> Scores:
        """`overall`, `changed` or `kept` by kind of edit, and as the mean over the kinds."""
        counts = {tag: (sum(marks), len(marks)) for tag, marks in self._marks(name).items()}
        tags = {tag: wilson(*count) for tag, count in counts.items()}
        return Scores(mean_of(list(tags.values())), tags, counts)

    def mean(self, name: str) -> Interval:
        """A measure's mean, with its interval over edits."""
        return mean_over_prompts(list(self._by_prompt({name: 1.0}).values()))

    def overall(self) -> Interval:
        """The share that changed and kept; of a list, the weighted sum of the rewards."""
        return self.shares("overall").overall if self.split else mean_over_prompts([*self._weighted().values()])

    def to_json(self) -> dict[str, Any]:
        """The content of eval.json: `tags` are the kinds of edit, or a list's measures."""
        content: dict[str, Any] = {"suite": "editing", "num_images": len(self.judged)}
        means = {name: interval_json(self.mean(name)) for name in self.measures}
        if self.split:
            content |= self.shares("overall").to_json()
            content |= {name: self.shares(name).to_json() for name in ("changed", "kept")}
        else:
            overall = interval_json(self.overall())
            content |= {"overall": overall.pop("score"), **overall}
            total = len(self.judged)
            content["tags"] = {name: {"correct": None, "total": total, **mean} for name, mean in means.items()}
        rows = [self._row(item) for item in self.judged]
        return content | {"measures": means, "split": self.split, "weights": dict(self.weights), "images": rows}

    def show(
        self, console: Console, other: EditingResult | None = None, *, labels: tuple[str, str] = ("other", "this")
    ) -> None:
        """Print the shares and the measures."""
        for name, title in SHARES.items() if self.split else ():
            scores = [self.shares(name)] if other is None else [other.shares(name), self.shares(name)]
            change = None if other is None else self._difference(other, name)
            console.print(share_table(f"editing, {title}, %", scores, change, labels))
        columns = (*labels, "difference") if other else ("mean",)
        table = plain_table(f"editing, {len(self.judged)} edits, 95 % intervals", ("measure", *columns))
        for name in self.measures:
            cells = [number(self.mean(name))]
            if other is not None:
                values = f"{other.mean(name).value:.4g}", f"{self.mean(name).value:.4g}"
                cells = [*values, number(self._change(other, {name: 1.0}), "+")]
            table.add_row(styled(name), *cells)
        console.print(table)

    def against(self, other: EditingResult) -> dict[str, Any]:
        """This minus the other, edit by edit; UserError if they are not the same edits."""
        changes = {name: change_json(self._change(other, {name: 1.0})) for name in self.measures}
        if not self.split:
            return {"difference": {"overall": change_json(self._change(other, self.weights)), "measures": changes}}
        shares = {}
        for name in SHARES:
            overall, tags = self._difference(other, name)
            shares[name] = {"overall": asdict(overall), "tags": {tag: asdict(part) for tag, part in tags.items()}}
        first = shares.pop("overall")
        return {"difference": {**first, **shares, "measures": changes}}

    def _row(self, item: Judged) -> dict[str, Any]:
        row = {"prompt": item.prompt, "from": item.metadata.get("from")}
        if self.split:
            row |= {"tag": item.metadata["tag"], "correct": item.row["changed"] and item.row["kept"]}
            row |= {key: item.row[key] for key in ("changed", "kept", "reason")}
        row |= {"scores": {name: item.row[name] for name in self.measures}}
        return row | ({"filename": item.filename} if item.filename else {})

    def _marks(self, name: str) -> dict[str, list[bool]]:
        """By kind of edit."""
        needed = ("changed", "kept") if name == "overall" else (name,)
        marks: dict[str, list[bool]] = {}
        for item in self.judged:
            marks.setdefault(str(item.metadata["tag"]), []).append(all(item.row[key] for key in needed))
        return marks

    def _weighted(self) -> dict[int, float]:
        return self._by_prompt(self.weights)

    def _by_prompt(self, weights: Mapping[str, float]) -> dict[int, float]:
        """The weighted sum of measures by edit, over its images."""
        values: dict[int, list[float]] = {}
        for item in self.judged:
            total = sum(weight * float(item.row[name]) for name, weight in weights.items())
            values.setdefault(item.prompt_index, []).append(total)
        return {index: sum(found) / len(found) for index, found in values.items()}

    def _change(self, other: EditingResult, weights: Mapping[str, float]) -> Interval:
        self._check_same(other)
        ours, theirs = self._by_prompt(weights), other._by_prompt(weights)
        return mean_over_prompts([ours[index] - theirs[index] for index in ours])

    def _difference(self, other: EditingResult, name: str) -> tuple[Interval, dict[str, Interval]]:
        self._check_same(other)
        before, after = other._marks(name), self._marks(name)
        tags = {tag: paired_difference(before[tag], after[tag]) for tag in after}
        return mean_of(list(tags.values())), tags

    def _check_same(self, other: EditingResult) -> None:
        if _edits(self.judged) != _edits(other.judged):
            raise UserError(
                "the two results are of different edits, so they cannot be paired; make both with the same --prompts, "
                "--num-images and --seed."
            )


def _edits(judged: Sequence[Judged]) -> list[tuple[Any, ...]]:
    return [(item.prompt_index, item.number, item.metadata.get("from"), item.prompt) for item in judged]
