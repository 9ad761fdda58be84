"""The model card of a run: README.md beside its adapters, with the front matter that the hub reads.

It follows what PEFT and diffusers write: the base, the library, tags, the licence, pictures, figures with intervals,
and how to load the files. Folders on this machine are named without their paths.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from agsm_rl import __version__
from agsm_rl.errors import UserError
from agsm_rl.export.attach import BASE_OPTIONS, LORA_FILE, find_exports, read_export
from agsm_rl.files import HUB_NAME, local_path, read_json, read_text, write_text

MARK = "<!-- Written by agsm-rl. Delete this line, and your changes are kept. -->"
PICTURES = "pictures.png"
LICENCES: dict[str, dict[str, Any]] = {
    "stable-diffusion-v1-5": {"license": "creativeml-openrail-m"},
    "CompVis/stable-diffusion": {"license": "creativeml-openrail-m"},
    "stable-diffusion-xl": {"license": "openrail++"},
    "stable-diffusion-3": {"license": "other", "license_name": "stabilityai-ai-community"},
}
"""What begins a base's name on the hub, or its part after the owner → the licence that it hands on."""
PAPERS = {
    "agsm": "2605.30038",
    "anchor": "2305.16381",
    "awm": "2509.25050",
    "crd": "2603.14128",
    "ddpo": "2305.13301",
    "dgpo": "2510.08425",
    "diffusion_dpo": "2311.12908",
    "diffusion_nft": "2509.16117",
    "flow_dppo": "2606.11025",
    "flow_grpo": "2505.05470",
    "grpo_guard": "2510.22319",
    "inpo": "2503.18454",
    "opd": "2605.15055",
    "reward_backprop": "2309.17400",
    "score_matching": "2006.11239",
    "softrepa": "2503.08250",
    "spo": "2406.04314",
}
"""Objective → the number of its paper at arXiv."""
MAX_ROWS = 40
"""Rows of the table of figures."""


def write_card(run: Path, *, licence: str | None = None) -> Path:
    """Write adapter/README.md of a run, and a picture beside it; the card's path.

    UserError where the run has no adapters, or where the card is somebody's own (without MARK).
    """
    run = local_path(run)
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: is not a run folder (it has no recipe.yaml); give the folder of a run.")
    files = find_exports(run)
    card = files[0].parent / "README.md"
    if card.exists() and MARK not in read_text(card):
        raise UserError(f"{card}: is not overwritten, because it is no longer what agsm-rl wrote. Move it away first.")
    picture = _newest_picture(run)
    if picture is not None:
        shutil.copyfile(picture, card.with_name(PICTURES))
    write_text(card, card_text(run, files, licence=licence, picture=PICTURES if picture else None))
    return card


def card_text(run: Path, files: list[Path], *, licence: str | None = None, picture: str | None = None) -> str:
    """The card: front matter, and sections of Markdown."""
    recipe = yaml.safe_load(read_text(run / "recipe.yaml"))
    checkpoint = str(recipe["backbone"].get("checkpoint", ""))
    kinds = {file.name: read_export(file)[1]["kind"] for file in files}
    only_lora = [*kinds] == [LORA_FILE]
    base = None if _is_local(checkpoint) else checkpoint
    of_base: dict[str, Any] = next((terms for name, terms in LICENCES.items() if base and name in base), {})
    stated: dict[str, Any] = {"license": licence} if licence else of_base
    data = ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=_tags(recipe, kinds, base),
        **stated,
    )
    parts = [
        f"# {run.resolve().name}",
        MARK,
        f"{' and '.join(_adapters(recipe))} for {_shown(checkpoint)}, trained by "
        f"[agsm-rl](https://github.com/agsm-rl/agsm-rl) {__version__}.",
        *([f"![Pictures during the training]({picture})"] if picture else []),
        "## How to load",
        _how_to_load(checkpoint, only_lora=only_lora),
        *_on_the_base(recipe["backbone"]),
        "## Training",
        *_training(recipe),
        *_figures(run / "eval.json"),
        "## Licence",
        _licence(licence, of_base, base),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n", ignore_metadata_errors=True))


RANKED = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa"}
"""Kinds of adapter that have a rank."""


def _tags(recipe: Mapping[str, Any], kinds: Mapping[str, str], base: str | None) -> list[str]:
    tags = ["text-to-image", "diffusers", "agsm-rl", *dict.fromkeys(kind.replace("_", "-") for kind in kinds.values())]
    tags += dict.fromkeys(term["use"].replace("_", "-") for term in recipe["objectives"])
    return tags + ([f"base_model:adapter:{base}"] if base else [])


def _adapters(recipe: Mapping[str, Any]) -> list[str]:
    words = []
    for block in recipe["adapters"].values():
        if block["use"] in RANKED:
            form = "DoRA" if block.get("use_dora") else RANKED[block["use"]]
            words.append(f"A {form} of rank {block.get('rank')}")
        elif block["use"] == "oft":
            words.append(f"OFT in blocks of {block.get('oft_block_size')}")
        elif block["use"] == "soft_tokens":
            words.append(f"{block.get('num_tokens')} soft tokens per layer")
        else:
            words.append(f"An adapter ({block['use']})")
    return words


def _how_to_load(checkpoint: str, *, only_lora: bool) -> str:
    place = "path/to/this/folder"
    lines = ["from diffusers import AutoPipelineForText2Image", ""]
    name = checkpoint if not _is_local(checkpoint) else "path/to/the/base"
    lines.append(f'pipe = AutoPipelineForText2Image.from_pretrained("{name}")')
    if only_lora:
        lines.append(f'pipe.load_lora_weights("{place}")     # or this repository\'s name')
    else:
        lines = [
            "from agsm_rl import attach",
            *lines,
            f'handle = attach(pipe, "{place}")     # handle.detach() undoes it',
        ]
    return "\n".join(["```python", *lines, 'image = pipe("a prompt").images[0]', "```"])


def _on_the_base(block: Mapping[str, Any]) -> Iterator[str]:
    options = {name: block[name] for name in BASE_OPTIONS if name != "dtype" and block.get(name) is not None}
    if options:
        shown = ", ".join(f"`{name}: {_shown(str(value))}`" for name, value in options.items())
        yield f"It was trained on that base with {shown}. Load and set the same, or the pictures differ."


def _training(recipe: Mapping[str, Any]) -> Iterator[str]:
    optimizer = recipe.get("optimizer", {})
    yield (
        f"{recipe['steps']} steps, seed {recipe.get('seed', 0)}, {optimizer.get('use', 'adamw')} with learning rate "
        f"{optimizer.get('learning_rate')}, weight decay {optimizer.get('weight_decay')}."
        f"{' The files hold the moving average (EMA) of the weights.' if recipe.get('export') == 'ema' else ''}"
    )
    if recipe.get("start_from"):
        yield _beginning(recipe)
    rows = ["| objective | trains | learns from | rewards | weight | options |", "|---|---|---|---|---|---|"]
    beside = {"use", "name", "source", "view", "weight", "every", "offset", "t", "trains", "rewards"}
    for term in recipe["objectives"]:
        source = term["source"]
        block = recipe.get("sources", {}).get(source, {}) if isinstance(source, str) else source
        rewards = term.get("rewards") or block.get("rewards") or {}
        data = block.get("dataset") or block.get("prompts") or ""
        paper = PAPERS.get(term["use"])
        name = f"[{term['use']}](https://arxiv.org/abs/{paper})" if paper else term["use"]
        options = ", ".join(f"{key}: {value}" for key, value in term.items() if key not in beside and value is not None)
        from_ = f"{block.get('use')} of {_shown(str(data))}"
        cells = [name, ", ".join(_trains(term, recipe)), from_, ", ".join(rewards), term.get("weight"), options]
        rows.append(f"| {' | '.join(_cell(str(cell)) for cell in cells)} |")
    yield "\n".join(rows)


def _trains(term: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    return list(term.get("trains") or recipe["adapters"])


def _beginning(recipe: Mapping[str, Any]) -> str:
    """What the training began from, what was not trained, and what a distance was measured from."""
    trained = {name for term in recipe["objectives"] for name in _trains(term, recipe)}
    frozen = [name for name in recipe["adapters"] if name not in trained]
    words = f"The training began from the adapters of {_shown(recipe['start_from'])}"
    if frozen:
        words += f"; {' and '.join(frozen)} {'was' if len(frozen) == 1 else 'were'} not trained further"
    if recipe.get("reference") == "start_from":
        words += ". An anchor, a KL and preferences measure from the model with those adapters, not from the base"
    return words + "."


def _figures(file: Path) -> Iterator[str]:
    """Base against trained, as eval.json has it; nothing where there is none."""
    if not file.is_file():
        return
    rows = [row for name, entry in _entries(read_json(file)) for row in _rows(name, entry)]
    if rows:
        yield "## Figures"
        yield "Base and trained on the same prompts and noise, with 95 % intervals."
        head = "| suite | guidance | score | base | trained |\n|---|---|---|---|---|"
        yield "\n".join([head, *rows[:MAX_ROWS]])
        if len(rows) > MAX_ROWS:
            yield f"{len(rows) - MAX_ROWS} more rows are left out."


def _entries(content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The measurements of an eval.json with their suites' names."""
    if not isinstance(content, Mapping):
        return
    suites = content.get("suites")
    if isinstance(suites, Mapping) and suites:
        for name, suite in suites.items():
            for entry in suite.get("guidances", []) if isinstance(suite, Mapping) else []:
                yield str(name), entry
        return
    for entry in [content, *(content.get("other_guidances") or [])]:
        yield str(entry.get("suite", "")), entry


def _rows(name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    base = entry.get("base") or {}
    guidance = entry.get("guidance", "")

    def row(score: str, before: str, after: str) -> str:
        return f"| {_cell(name)} | {guidance} | {_cell(score)} | {before} | {after} |"

    if isinstance(entry.get("overall"), int | float):
        yield row("overall", _interval(base), _interval(entry))
    for tag, trained in (entry.get("tags") or {}).items():
        before = (base.get("tags") or {}).get(tag) or {}
        yield row(tag, _interval(before, "score"), _interval(trained, "score"))
    for reward, value in (entry.get("rewards") or {}).items():
        yield row(reward, _number((base.get("rewards") or {}).get(reward)), _number(value))


def _interval(figures: Mapping[str, Any], key: str = "overall") -> str:
    value, low, high = (_number(figures.get(name)) for name in (key, "low", "high"))
    return f"{value} [{low}, {high}]" if low and high else value


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else ""


def _licence(given: str | None, of_base: Mapping[str, str], base: str | None) -> str:
    if given:
        return f"{given}. The base keeps its own licence, which may restrict what is made from it."
    if of_base:
        return f"That of {base}, from which these weights were trained."
    return "Not stated. The base's licence holds for what is made from it; see there."


def _newest_picture(run: Path) -> Path | None:
    """Base and trained side by side, or the newest grid."""
    grids = [run / "samples" / "before_after.png", *sorted((run / "samples").glob("step-*.png"), reverse=True)]
    return next((file for file in grids if file.is_file()), None)


def _is_local(checkpoint: str) -> bool:
    return checkpoint.startswith("builtin:") or not HUB_NAME.fullmatch(checkpoint) or local_path(checkpoint).exists()


def _shown(name: str) -> str:
    """A name for readers elsewhere: of a path, only the last part."""
    if not name or name.startswith("builtin:") or not _is_local(name):
        return name or "its own data"
    return Path(name).name


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
