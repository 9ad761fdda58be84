"""What a local folder of data holds, as explicit files: listed here, so that nothing is guessed from their names.

`datasets` takes files and folders called train, test or dev for splits wherever they are: a class folder `train` or a
file `a train.png` would hide all other images. Here a folder is laid out as splits only where all of it is. A clone of
a hub data set is read by the configurations in its README. What is left out is reported.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.sources.folder_files import NAMED, SIDECARS, counted, list_files, name_some
from agsm_rl.sources.pictures import SUFFIXES as PICTURES
from agsm_rl.sources.tables import TABLES

log = logging.getLogger(__name__)

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Tables that say what the images beside and below them show."""
SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""What files and folders of a split are called → the split, as `datasets` names it."""
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
"""A shard as `datasets` writes it to the hub."""
YES = ("true", "True", "TRUE", "yes", "Yes", "on")
"""How YAML says that a configuration is the default one."""
DOCUMENTS = re.compile(
    r"readme|licen[cs]e|citation|changelog|notice|dataset_infos?\.|thumbs\.db|desktop\.ini|.*\.(md|rst|txt|caption|py|ipynb|lock)$"
)
"""Files of which nobody expects that they are data."""

Kind = Literal["saved", "parquet", "arrow", "archives", "images", "tables"]


@dataclass(frozen=True)
class Listing:
    """The files of each split, in order, and what kind they are of. `saved` is the folder of `save_to_disk`."""

    kind: Kind
    splits: Mapping[str, Sequence[Path]]

    def files(self, split: str | None, where: str) -> tuple[str, Sequence[Path]]:
        """A split's name and files, of None the first one's; UserError lists the splits that there are."""
        if split is None:
            return next(iter(self.splits.items()))
        for name in (split, SPLITS.get(split.lower(), split)):
            if name in self.splits:
                return name, self.splits[name]
        raise unknown_name(f"{where}: split", split, "a split of it", self.splits)


def list_data(root: Path, *, config: str | None, where: str) -> Listing:
    """What a folder or file holds. `config` names one of the configurations in a hub clone's README.

    UserError where that is nothing, or several configurations of which none is named.
    """
    if root.is_file():
        if config is not None:
            raise UserError(f"{where}: config '{config}' means nothing for a single file; leave it out")
        return Listing(_kind_of(root, where), {"train": [root]})
    if (root / "dataset_dict.json").is_file():
        return Listing("saved", {place.name: [place] for place in sorted(root.iterdir()) if _is_saved(place)})
    if _is_saved(root):
        return Listing("saved", {"train": [root]})
    configs = read_configs(root, where)
    if configs:
        return _of_config(root, configs[choose_config(list(configs), config, configs, where)], where)
    if config is not None:
        if not (root / config).is_dir():
            raise UserError(
                f"{where}: config '{config}': its README names no configurations, and it has no such folder"
            )
        root = root / config
    return _listing(root, list_files(root, where), where)


def read_configs(root: Path, where: str) -> dict[str, Mapping[str, Any]]:
    """The configurations that a hub data set's README declares, by name."""
    readme = root / "README.md"
    try:
        text = readme.read_text(encoding="utf-8-sig", errors="replace")[: 1 << 20] if readme.is_file() else ""
        match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        # Texts only: the other loaders follow merges and read numbers of any length, which can take for ever.
        header = yaml.load(match[1], Loader=yaml.BaseLoader) if match else None
    except (OSError, yaml.YAMLError, RecursionError, ValueError) as error:
        log.warning("%s: the header of its README.md cannot be read and is ignored (%s)", where, str(error)[:200])
        return {}
    configs = header.get("configs") if isinstance(header, Mapping) else None
    named = [
        entry for entry in configs or [] if isinstance(entry, Mapping) and entry.keys() & {"data_files", "data_dir"}
    ]
    return {_texts(entry.get("config_name", "default"), "config_name", where)[0]: entry for entry in named}


def choose_config(
    names: Sequence[str], config: str | None, entries: Mapping[str, Mapping[str, Any]], where: str
) -> str:
    """The configuration to read: the named one, the only one, or the default; UserError lists them otherwise."""
    if config is not None:
        if config not in names:
            raise unknown_name(f"{where}: config", config, "a configuration of it", names)
        return config
    default = [name for name in names if entries[name].get("default") in YES]
    default += [name for name in names if name == "default"]
    if len(names) == 1 or default:
        return (default or list(names))[0]
    raise UserError(f"{where}: it has several configurations ({', '.join(names)}); say which one by `config:`")


def _of_config(root: Path, entry: Mapping[str, Any], where: str) -> Listing:
    """The files that a README's configuration names; UserError where it names none that are there."""
    given = entry.get("data_files")
    if given is None:
        place = _inside(root, _texts(entry["data_dir"], "data_dir", where)[0], where)
        return _listing(place, list_files(place, where), where)
    patterns: dict[str, list[str]] = {}
    if isinstance(given, Mapping):
        given = [{"split": split, "path": path} for split, path in given.items()]
    for item in given if isinstance(given, list) else [given]:
        split, path = (
            (item.get("split", "train"), item.get("path", "")) if isinstance(item, Mapping) else ("train", item)
        )
        paths = _texts(path, "data_files", where)
        patterns.setdefault(_texts(split, "split", where)[0], []).extend(paths)
    splits = {split: _matching(root, paths, where) for split, paths in patterns.items()}
    kinds = {}
    for split, files in splits.items():
        if not files:
            raise UserError(
                f"{where}: its README.md names {', '.join(patterns[split])} for the split '{split}', but there are no "
                "such files; was it downloaded completely?"
            )
        kinds[split], splits[split] = _data_among(files, where)
    return Listing(next(iter(kinds.values())), splits)


def _texts(value: object, key: str, where: str) -> list[str]:
    """A text or a list of texts of the README; UserError for anything else (never shown: aliases can make it huge)."""
    values = value if isinstance(value, list) else [value]
    texts = [text for text in values if isinstance(text, str)]
    if not texts or len(texts) < len(values):
        raise UserError(f"{where}: `{key}` in its README.md is not a text or a list of texts; correct it there")
    return texts


def _matching(root: Path, patterns: Sequence[str], where: str) -> list[Path]:
    files: dict[Path, None] = {}
    for pattern in patterns:
        _inside(root, pattern, where)
        for name in sorted(glob.glob(pattern, root_dir=root, recursive=True)):
            path = root / name
            files |= dict.fromkeys(list_files(path, where) if path.is_dir() else [path] if path.is_file() else [])
    return list(files)


def _inside(root: Path, name: str, where: str) -> Path:
    """A path that a README gives, which may not lead out of the data set."""
    if os.path.isabs(name) or ".." in Path(name).parts or "://" in name:
        raise UserError(f"{where}: its README.md names '{name}', which is outside the data set")
    return root / name


def _listing(root: Path, files: Sequence[Path], where: str) -> Listing:
    kind, data = _data_among(files, where)
    splits = _splits_of_folders(root, data, where) if kind == "images" else _splits_of_names(root, data)
    return Listing(kind, splits or {"train": data})


def _data_among(files: Sequence[Path], where: str) -> tuple[Kind, list[Path]]:
    """Which of these files are the data, and of which kind; other data files among them are reported."""
    by_kind: dict[str, list[Path]] = {}
    for file in files:
        by_kind.setdefault(_role(file), []).append(file)
    sidecars = {file.with_suffix("") for file in files if file.suffix.lower() in SIDECARS}
    captioned = "metadata" in by_kind or any(image.with_suffix("") in sidecars for image in by_kind.get("images", []))
    captioned &= "images" in by_kind
    kinds: list[Kind] = ["images"] if captioned else ["parquet", "arrow", "images", "archives", "tables"]
    for kind in kinds:
        if kind in by_kind:
            used = {kind, "documents"} | ({"metadata"} if kind == "images" else set())
            _report_unused([file for role, some in by_kind.items() if role not in used for file in some], kind, where)
            return kind, by_kind[kind] + (by_kind.get("metadata", []) if kind == "images" else [])
    if "metadata" in by_kind:
        tables = by_kind["metadata"]
        return ("parquet" if all(file.suffix == ".parquet" for file in tables) else "tables"), tables
    odd = Counter(file.suffix.lower() or file.name for file in by_kind.get("other", []))
    holds = f"; it holds {', '.join(f'{count} {name}' for name, count in odd.most_common(NAMED))}" if odd else ""
    raise UserError(
        f"{where}: it has no images and no tables{holds}; give a folder of images with captions (a metadata.jsonl, or "
        "a NAME.txt beside each image), or of parquet, csv or jsonl files"
    )


def _role(file: Path) -> str:
    name, suffix = file.name.lower(), file.suffix.lower()
    if name in METADATA:
        return "metadata"
    if DOCUMENTS.match(name):
        return "documents"
    if suffix in PICTURES:
        return "images"
    if suffix in (".parquet", ".arrow"):
        return suffix[1:]
    if suffix in (".tar", ".zip", ".tgz") or name.endswith(".tar.gz"):
        return "archives"
    return "tables" if suffix in TABLES else "other"


def _kind_of(file: Path, where: str) -> Kind:
    role = _role(file)
    if role == "metadata":
        role = "parquet" if file.suffix.lower() == ".parquet" else "tables"
    if role in ("parquet", "arrow", "archives", "tables"):
        return role  # type: ignore[return-value]
    raise UserError(
        f"{where}: it is a single {file.suffix or 'file'}; give the folder of the images, or a table (parquet, csv, "
        "tsv, jsonl, json) or an archive (tar, zip) of them"
    )


def _report_unused(files: Sequence[Path], kind: str, where: str) -> None:
    if not files:
        return
    suffixes = Counter(file.suffix.lower() or file.name for file in files)
    counts = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
    what = {"images": "its images", "tables": "its tables", "archives": "its archives"}.get(kind, f"its {kind} files")
    log.warning("%s: only %s are read, not %s (%s): %s", where, what, _others(files), counts, name_some(files))


def _others(files: Sequence[Path]) -> str:
    return counted(len(files), "other file")


def _splits_of_folders(root: Path, files: Sequence[Path], where: str) -> dict[str, list[Path]]:
    """The splits of a folder of images: those folders that it is made of, where all of them are called so."""
    images = [file for file in files if file.name.lower() not in METADATA]
    tops = {file.relative_to(root).parts[0] if len(file.relative_to(root).parts) > 1 else "" for file in images}
    if len(tops) < 2 or not all(top.lower() in SPLITS for top in tops):
        return {}
    splits: dict[str, list[Path]] = {}
    for top in sorted(tops, key=lambda name: list(SPLITS).index(name.lower())):
        splits.setdefault(SPLITS[top.lower()], []).extend(file for file in files if root / top in file.parents)
    upper = [file for file in files if file.parent == root]  # metadata of all splits together
    counts = {name: sum(file in some for file in images) for name, some in ((n, set(f)) for n, f in splits.items())}
    log.warning(
        "%s: it is laid out as splits (%s); `split:` says which one is read, train by default",
        where,
        ", ".join(f"{name}: {counted(count, 'image')}" for name, count in counts.items()),
    )
    return {name: [*upper, *some] for name, some in splits.items()}


def _splits_of_names(root: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The splits of tables or archives by their names, where all of them have such names."""
    splits: dict[str, list[Path]] = {}
    certain = True
    for file in files:
        split = _split_of_name(file.relative_to(root))
        if split is None:
            return {}
        certain &= split[1]
        splits.setdefault(split[0], []).append(file)
    if not certain and len(splits) < 2:  # crash_test.csv alone
        return {}
    order = list(dict.fromkeys(SPLITS.values()))
    return dict(sorted(splits.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _split_of_name(path: Path) -> tuple[str, bool] | None:
    """The split that a path names, and whether there is no doubt; None where it names none.

    No doubt of train.csv, train_1.csv, train-00000-of-00002.parquet and train/1.parquet, some of cats_train.csv.
    """
    stem = path.name.partition(".")[0]
    if shard := SHARD.fullmatch(stem):
        return SPLITS.get(shard[1].lower(), shard[1]), True
    words = [word for word in re.split(r"[-_]", stem.lower()) if not word.isdigit()]
    named = [word for word in words if word in SPLITS]
    if len(named) == 1:
        return SPLITS[named[0]], len(words) == 1
    folders = [SPLITS[part.lower()] for part in path.parts[:-1] if part.lower() in SPLITS]
    return (folders[-1], True) if folders else None


def _is_saved(place: Path) -> bool:
    return (place / "state.json").is_file() and (place / "dataset_info.json").is_file()
