"""Writes the table of recipes, docs/recipes.md and recipes/README.md: `python docs/make_recipes.py`.

It is made from the comments at the top of the recipes: to change a row, change that. A test in tests/docs fails
while a page is not what this script writes.
"""

import re
from pathlib import Path

import yaml

from agsm_rl.recipe.shipped import NOT_MEASURED, Header, header_of

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
MADE = "<!-- Made by docs/make_recipes.py from the recipes' headers; change those, then run it. -->"
ON_GITHUB = "https://github.com/agsm-rl/agsm-rl/blob/main/"
ONE, SEVERAL = "One objective, on the shipped model", "Several objectives or rewards, on the shipped model"
FOLDERS = {
    "stacking": "In sequence, in turns, jointly: ways to stack",
    "sd15": "Stable Diffusion 1.5, with the authors' settings",
    "sd3": "Stable Diffusion 3.5 Medium, with the authors' settings",
    "flux": "FLUX.1 [dev]",
    "flux_2": "FLUX.2 [klein]",
    "qwen_image": "Qwen-Image",
    "sana": "SANA",
    "z_image": "Z-Image",
    "paper": "The AGSM paper's tables",
    "study": "The study's sweeps",
}
"""What the recipes of each folder are for, in the order of the page; those at the top are for the shipped model."""
LONGEST = 150
"""Characters of a result in the table; the header has all of it."""

INTRODUCTION = """# Recipes

{made}

All {count} recipes and sweeps that ship with the package: what each shows, what it takes, and what came of it.
`agsm-rl train builtin:NAME` runs a recipe, `agsm-rl check builtin:NAME` says first what it would train and the
memory that it needs, `agsm-rl sweep builtin:NAME` runs a sweep. To write your own: [your first
recipe]({docs}guides/first-recipe.md). On the other shipped models: `--set backbone.checkpoint=builtin:shapes-sd3`.

Results are of the base and the trained model, with 95 % intervals of the difference in brackets; the header of a
recipe has all of its figures, or names the study's section that has them, and [the results]({docs}results.md)
explain them. Where it says *{not_measured}*, nobody has run the recipe to its end with this code."""


def pages() -> dict[Path, str]:
    """The text of each page, by its file."""
    rows = sections()
    return {
        ROOT / "docs" / "recipes.md": page(rows, recipes=f"{ON_GITHUB}recipes/", docs=""),
        RECIPES / "README.md": page(rows, recipes="", docs="../docs/"),
    }


def sections() -> dict[str, list[Path]]:
    """The recipes' files by the heading that they come under."""
    found: dict[str, list[Path]] = {heading: [] for heading in (ONE, SEVERAL, *FOLDERS.values())}
    for file in sorted(RECIPES.rglob("*.yaml")):
        found[heading_of(file)].append(file)
    return {heading: files for heading, files in found.items() if files}


def heading_of(file: Path) -> str:
    """The heading of a recipe's folder; of one at the top, whether it combines anything."""
    folder = file.relative_to(RECIPES).parts[0]
    if folder != file.name:
        if folder not in FOLDERS:
            raise SystemExit(f"recipes/{folder} is new: say in FOLDERS of docs/make_recipes.py what it is for")
        return FOLDERS[folder]
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    rewards = [source.get("rewards", {}) for source in recipe.get("sources", {}).values()]
    combines = len(recipe["objectives"]) > 1 or any(len(given) > 1 for given in rewards)
    return SEVERAL if combines else ONE


def page(rows: dict[str, list[Path]], *, recipes: str, docs: str) -> str:
    """The page with links to `recipes` and `docs`."""
    count = sum(map(len, rows.values()))
    lines = [INTRODUCTION.format(made=MADE, count=count, docs=docs, not_measured=NOT_MEASURED)]
    for heading, files in rows.items():
        lines += [
            "",
            f"## {heading}",
            "",
            "| recipe | what it shows | hardware and time | result |",
            "|---|---|---|---|",
        ]
        lines += [row(file, recipes, docs) for file in files]
    return "\n".join(lines) + "\n"


def row(file: Path, recipes: str, docs: str) -> str:
    """A recipe's row."""
    name, header = file.relative_to(RECIPES).as_posix(), header_of(file)
    result = result_of(header.result).replace("docs/study/README.md", f"[the study]({docs}study/README.md)")
    shows = re.sub(r" \([^()]*\.(py|yaml|sh)\b[^()]*\)", "", header.title)  # files of other projects
    cells = [f"[{name.removesuffix('.yaml')}]({recipes}{name})", shows, cost_of(header), result]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def cost_of(header: Header) -> str:
    """Hardware, and time where it was measured."""
    if not header.hardware:
        raise SystemExit(f"'{header.title:.60}…' has no line `# Hardware:`; every recipe says what it takes")
    return " ".join(part[0].upper() + part[1:].rstrip(".") + "." for part in (header.hardware, header.time) if part)


def result_of(result: str) -> str:
    """The first figures of a result."""
    first = re.split(r";|(?<=[a-z)%])\. ", result)[0].replace("->", "→")
    short = re.sub(r"^held-out, 600 images, strict, one seed: ", "", re.sub(r", counting [^)]*\]( points)?", "", first))
    if len(short) > LONGEST:
        short = short[:LONGEST].rsplit(" ", 1)[0] + " …"
    return f"*{result}*" if result.startswith("not measured") else short


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
