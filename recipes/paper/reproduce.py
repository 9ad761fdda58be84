"""Redo the AGSM paper's tables on SD1.5, SDXL and SD3: train, measure, collect, in commands that you could type.

    python recipes/paper/reproduce.py run --dry-run --gpu H100         every command, its memory and its time
    python recipes/paper/reproduce.py run --table coco --model sd15    runs them; run again, it continues
    python recipes/paper/reproduce.py run --toy --out build/toy        the same at toy size, on a CPU
    python recipes/paper/reproduce.py data COCO                        COCO's folders in the form that is needed
    python recipes/paper/reproduce.py check results.json               may they stand beside the published figures?
    python recipes/paper/reproduce.py table results.json               published beside measured
    python recipes/paper/reproduce.py costs                            counts costs.json anew

README.md beside this file says what to fetch first, and what is known to differ from the paper.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import paper_costs
import typer
from paper_data import prepare
from paper_hashes import hashes_of
from paper_plan import ARMS, MODELS, TABLES, Part, Place, all_parts, write_rewards
from paper_results import collect, device, make_tables, other_data, problems_of, read, revision

from agsm_rl.errors import UserError, unknown_name

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0])
OUT, DATA = Path("runs/paper"), Path("data")
Many = list[str] | None
Run = Callable[[tuple[str, ...]], int]


def in_a_process(command: tuple[str, ...]) -> int:
    """The exit code of a command, in a process of its own and with this interpreter's packages."""
    return subprocess.run([sys.executable, "-m", "agsm_rl", *command[1:]], check=False).returncode


def here(command: tuple[str, ...]) -> int:
    """The exit code of a command in this process, which imports torch once for all: for toy runs."""
    from agsm_rl.cli import app as agsm_rl

    try:
        agsm_rl(list(command[1:]))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


class Records:
    """Which commands were run to their end: a file for each, so that a cut run loses the one it was in."""

    def __init__(self, place: Place) -> None:
        self.place, self.folder = place, place.out / "done"
        self.known: dict[Path, str] = {}

    def _file(self, part: Part) -> Path:
        return self.folder / f"{part.name.replace('/', '--')}.json"

    def of(self, part: Part) -> dict[str, Any] | None:
        """The record of a finished command; UserError where another command, data or weights made it."""
        file = self._file(part)
        if not file.is_file() or not part.makes.exists():
            return None
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if record["command"] != list(part.command):
            raise UserError(
                f"{file}: {part.name} was made by another command ({shlex.join(record['command'])}); give another "
                f"--out, or delete {part.makes} and this file."
            )
        if "sha256" not in record:
            raise UserError(
                f"{file}: does not say which data {part.name} was made with, as records do now; give another --out, or "
                f"delete {part.makes} and this file."
            )
        for name, sha256 in hashes_of(part, self.place, self.known).items():
            if record["sha256"].get(name) != sha256:
                raise UserError(
                    f"{file}: {part.name} was made with another {name} than is there now; put that back, or give "
                    "another --out."
                )
        return record

    def add(self, part: Part, seconds: float) -> None:
        """Record that a command has ended."""
        record = {"name": part.name, "command": list(part.command), "seconds": round(seconds, 1)}
        record |= {"finished": datetime.now(UTC).isoformat(timespec="milliseconds")}
        record |= {"device": device(), "revision": revision()}
        record |= {"sha256": hashes_of(part, self.place, self.known)}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file(part).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def all(self) -> list[dict[str, Any]]:
        """Those of all finished commands, in the order in which they ended."""
        found = [json.loads(file.read_text(encoding="utf-8")) for file in self.folder.glob("*.json")]
        return sorted(found, key=lambda record: record["finished"])


def continued(part: Part) -> tuple[str, ...]:
    """The command, or for a training that was cut the one that resumes it."""
    if part.name.endswith("/train") and (part.makes / "recipe.yaml").is_file():
        return ("agsm-rl", "train", str(part.makes), "--resume")
    return part.command


def run_all(parts: list[Part], place: Place, run: Run) -> Path:
    """Run what is not finished, and write the results after each; the results' file. UserError if a command fails."""
    records, results = Records(place), place.out / "results.json"
    write_rewards(place)
    for number, part in enumerate(parts, start=1):
        if records.of(part) is not None:
            continue
        command = continued(part)
        print(f"[{number}/{len(parts)}] {shlex.join(command)}", flush=True)
        part.makes.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        if code := run(command):
            raise UserError(f"{part.name}: the command ended with exit code {code}; repeat this one to continue.")
        records.add(part, time.monotonic() - began)
        _write(place, records, results)
    _write(place, records, results)
    return results


def _write(place: Place, records: Records, results: Path) -> None:
    content = collect(place, records.all(), tables=list(TABLES))
    results.write_text(content.model_dump_json(indent=1) + "\n", encoding="utf-8")


def show(parts: list[Part], gpu: str, *, toy: bool) -> None:
    """Print each command with its predicted memory and estimated time."""
    costs, total = paper_costs.read(), 0.0
    for part in parts:
        print(f"# {part.name}", end="")
        if not toy:
            amount, memory = paper_costs.seconds(part, costs, gpu), paper_costs.gib(part, costs)
            total += amount
            print(f": {memory:.0f} GiB, {paper_costs.as_time(amount)}" if memory else ": no GPU needed", end="")
        print(f"\n{shlex.join(part.command)}")
    if not toy:
        print(f"# {len(parts)} commands, {paper_costs.as_time(total)} on one {gpu}. Memory is predicted, and time")
        print(f"# estimated from FLOPs at {paper_costs.SHARE:.0%} of its peak; neither was measured.")


def chosen(given: Many, known: dict[str, Any], flag: str) -> list[str]:
    """The names given, or all; UserError for an unknown one."""
    for name in given or ():
        if name not in known:
            raise unknown_name(flag, name, "known here", known)
    return list(given or known)


def available(arms: list[str], place: Place) -> list[str]:
    """Without arms of released tokens whose files are not there, which is said."""
    missing = [key for key in arms if ARMS[key].released and not (place.data / str(ARMS[key].released)).is_dir()]
    if missing:
        print(f"# left out, because {place.data / 'tokens'} does not hold their files: {', '.join(missing)}")
    return [key for key in arms if key not in missing]


@app.command()
def run(
    table: Annotated[Many, typer.Option(help=f"Of {', '.join(TABLES)}. Repeatable; default: all.")] = None,
    model: Annotated[Many, typer.Option(help=f"Of {', '.join(MODELS)}. Repeatable; default: all.")] = None,
    arm: Annotated[Many, typer.Option(help="Such as sd15/agsm. Repeatable; default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds.")] = 3,
    out: Annotated[Path, typer.Option(help="Where runs, images and results go.")] = OUT,
    data: Annotated[Path, typer.Option(help="The folder with COCO and the released tokens.")] = DATA,
    gpu: Annotated[str, typer.Option(help=f"For the estimates: {', '.join(paper_costs.GPUS)}.")] = "H100",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands; run nothing.")] = False,
    toy: Annotated[bool, typer.Option("--toy", help="Run it all at toy size on the shipped bases.")] = False,
    base: Annotated[Many, typer.Option(metavar="MODEL=FOLDER", help="With --toy: another base. Repeatable.")] = None,
) -> None:
    """Train, measure and collect; finished commands are skipped, cut ones continued."""
    chosen([gpu], paper_costs.GPUS, "--gpu")
    tables, models = chosen(table, TABLES, "--table"), chosen(model, MODELS, "--model")
    bases = dict(text.split("=", 1) for text in base or () if "=" in text)
    if len(bases) != len(base or ()) or (bases and not toy):
        raise UserError("--base: write MODEL=FOLDER, together with --toy; the paper's bases are fixed.")
    arms = [key for key in chosen(arm, ARMS, "--arm") if ARMS[key].model in models]
    place = Place(out=out, data=data, toy=toy, bases=bases)
    arms = arms if dry_run and not toy else available(arms, place)
    needed = [f"{ARMS[key].model}/{ARMS[key].of}" for key in arms if ARMS[key].of]
    ordered = [key for key in ARMS if key in (*arms, *needed)]
    parts = all_parts(place, tables=tables, arms=ordered, seeds=seeds)
    if dry_run:
        show(parts, gpu, toy=toy)
        return
    print(f"{run_all(parts, place, here if toy else in_a_process)}: the results")


@app.command("data")
def make_data(
    coco: Annotated[Path, typer.Argument(help="The folder with train2017, val2017 and annotations.")],
    data: Annotated[Path, typer.Option(help="Where to write.")] = DATA,
) -> None:
    """Bring COCO into the form that the recipes and measurements take."""
    prepare(coco, data)
    print(f"{data}: coco_train2017/, coco_val/, coco_val_captions.txt")


@app.command()
def check(files: list[Path]) -> None:
    """Check results files; exit code 1 if figures may not stand beside the published ones, or beside each other."""
    texts = {str(file): _text(file) for file in files}
    problems = [f"{file}: {problem}" for file, text in texts.items() for problem in problems_of(text)]
    problems += other_data(texts) if len(texts) > 1 else []
    print("\n".join(problems or [f"{file}: may stand beside the published figures" for file in texts]))
    raise typer.Exit(1 if problems else 0)


@app.command("table")
def print_table(file: Path) -> None:
    """Print a results file as Markdown tables."""
    print(make_tables(read(_text(file), where=str(file))))


@app.command()
def costs() -> None:
    """Count costs.json anew (a minute of CPU time), and write README.md's table of it."""
    paper_costs.RECORD.write_text(json.dumps(paper_costs.count(), indent=1) + "\n", encoding="utf-8")
    page = paper_costs.PAGE
    page.write_text(paper_costs.with_table(page.read_text(encoding="utf-8")), encoding="utf-8")


def _text(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"{file}: there is no such file.")
    return file.read_text(encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a mistake in what was given ends with exit code 2 and one message."""
    try:
        app(arguments)
    except UserError as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
