"""The names that recipes may use: kind → name → "module:Class", imported on first use.

Built-in names are in BUILTIN; other packages register theirs as entry points of the group `agsm_rl.<kind>`. A recipe
is data: it can run registered code only, unless `--allow-import` on the command line allows another module. Registered
code that runs a command, or sends images or keys to a host, that the recipe specifies has a static method
`permissions(options)`. The permissions that it returns must be granted on the command line by `--allow-command`,
`--allow-host` and `--allow-env`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from agsm_rl.errors import UserError, unknown_name

HOME = "agsm-rl"

BUILTIN: dict[str, dict[str, str]] = {
    "objectives": {
        "agsm": "agsm_rl.objectives.agsm:AGSM",
        "awm": "agsm_rl.objectives.awm:AWM",
        "crd": "agsm_rl.objectives.crd:CRD",
        "ddpo": "agsm_rl.objectives.ddpo:DDPO",
        "anchor": "agsm_rl.objectives.anchor:Anchor",
        "dgpo": "agsm_rl.objectives.dgpo:DGPO",
        "diffusion_dpo": "agsm_rl.objectives.diffusion_dpo:DiffusionDPO",
        "diffusion_nft": "agsm_rl.objectives.diffusion_nft:DiffusionNFT",
        "flow_dppo": "agsm_rl.objectives.flow_dppo:FlowDPPO",
        "flow_grpo": "agsm_rl.objectives.flow_grpo:FlowGRPO",
        "grpo_guard": "agsm_rl.objectives.grpo_guard:GRPOGuard",
        "inpo": "agsm_rl.objectives.inpo:InPO",
        "opd": "agsm_rl.objectives.opd:OPD",
        "reward_backprop": "agsm_rl.objectives.reward_backprop:RewardBackprop",
        "score_matching": "agsm_rl.objectives.score_matching:ScoreMatching",
        "softrepa": "agsm_rl.objectives.softrepa:SoftREPA",
        "spo": "agsm_rl.objectives.spo:SPO",
    },
    "rewards": {
        "aesthetic": "agsm_rl_rewards.aesthetic:Aesthetic",
        "brightness": "agsm_rl_rewards.brightness:Brightness",
        "clip_score": "agsm_rl_rewards.clip_score:ClipScore",
        "geneval": "agsm_rl_rewards.geneval.reward:GenEvalReward",
        "hpsv2": "agsm_rl_rewards.hpsv2:HPSv2",
        "hpsv2_official": "agsm_rl_rewards.hpsv2_official:OfficialHPSv2",
        "http": "agsm_rl_rewards.worker.http_client:HttpReward",
        "image_reward": "agsm_rl_rewards.image_reward:ImageReward",
        "image_reward_official": "agsm_rl_rewards.image_reward_official:OfficialImageReward",
        "jpeg_compressibility": "agsm_rl_rewards.jpeg:JpegCompressibility",
        "jpeg_incompressibility": "agsm_rl_rewards.jpeg:JpegIncompressibility",
        "ocr": "agsm_rl_rewards.ocr:OCR",
        "pick_score": "agsm_rl_rewards.pick_score:PickScore",
        "questions": "agsm_rl_rewards.questions:Questions",
        "ray_pool": "agsm_rl_rewards.worker.ray_pool:RayPoolReward",
        "scenes": "agsm_rl_rewards.shapes:ScenesReward",
        "shapes": "agsm_rl_rewards.shapes:ShapesReward",
        "sharpness": "agsm_rl_rewards.sharpness:Sharpness",
        "step_aware_preference": "agsm_rl_rewards.step_aware_preference:StepAwarePreference",
        "vlm_judge": "agsm_rl_rewards.vlm_judge:VlmJudge",
        "worker": "agsm_rl_rewards.worker.reward:WorkerReward",
    },
    "adapters": {
        "soft_tokens": "agsm_rl.adapters.soft_tokens:SoftTokens",
        "lora": "agsm_rl.adapters.lora:LoRA",
        "lokr": "agsm_rl.adapters.lokr:LoKr",
        "loha": "agsm_rl.adapters.loha:LoHa",
        "oft": "agsm_rl.adapters.oft:OFT",
    },
    "sources": {
        "pairs": "agsm_rl.sources.pairs:Pairs",
        "preferences": "agsm_rl.sources.preferences:Preferences",
        "prompts": "agsm_rl.sources.prompts:Prompts",
        "rollouts": "agsm_rl.sources.rollouts:Rollouts",
        "step_preferences": "agsm_rl.sources.step_preferences:StepPreferences",
    },
    "views": {
        "best_images": "agsm_rl.sources.views:BestImages",
        "best_against_worst": "agsm_rl.sources.views:BestAgainstWorst",
        "images_above": "agsm_rl.sources.views:ImagesAbove",
        "varied_groups": "agsm_rl.sources.views:VariedGroups",
        "nonzero_advantages": "agsm_rl.sources.views:NonzeroAdvantages",
        "chosen_images": "agsm_rl.sources.views:ChosenImages",
    },
    "suites": {
        "editing": "agsm_rl.evaluate.suites.editing:Editing",
        "fid": "agsm_rl.evaluate.suites.fid:FID",
        "geneval": "agsm_rl.evaluate.suites.geneval:GenEval",
        "questions": "agsm_rl.evaluate.suites.questions:Questions",
        "rewards": "agsm_rl.evaluate.suites.rewards:Rewards",
        "scenes": "agsm_rl.evaluate.suites.scenes:Scenes",
        "shapes": "agsm_rl.evaluate.suites.shapes:Shapes",
    },
    "backbones": {
        "auto": "agsm_rl.backbones:load_backbone",
        "sana": "agsm_rl.backbones.sana:Sana",
        "stable_diffusion": "agsm_rl.backbones:load_backbone",
        "flux": "agsm_rl.backbones.flux:Flux",
        "flux_2": "agsm_rl.backbones.flux_2:Flux2Klein",
        "stable_diffusion_3": "agsm_rl.backbones.stable_diffusion_3:StableDiffusion3",
        "qwen_image": "agsm_rl.backbones.qwen_image:QwenImage",
        "z_image": "agsm_rl.backbones.z_image:ZImage",
    },
}

KINDS = tuple(BUILTIN)
NOUNS = {
    "objectives": "an objective",
    "rewards": "a reward",
    "adapters": "an adapter",
    "sources": "a source",
    "views": "a view",
    "suites": "a suite",
    "backbones": "a backbone",
}

OUT_OF_SCOPE = dict.fromkeys(
    (("adapters", name) for name in ("full", "full_finetune", "full_finetuning", "full_fine_tuning", "finetune")),
    "is not an adapter: full fine-tuning is out of scope, because the frozen base is also the reference and what an "
    "export is added to. Train a LoRA of high rank, {use: lora, rank: 128}; or fine-tune with another trainer, and "
    "give the result as backbone.checkpoint, or its denoiser as backbone.unet or backbone.transformer.",
)
"""What people look for that is not here, and what to do instead."""


@dataclass(frozen=True)
class Entry:
    """A registered name, the location of its class, and the installed package that it comes from."""

    name: str
    target: str
    package: str


def available(kind: str) -> dict[str, Entry]:
    """All registered names of a kind, sorted.

    Raises UserError if two packages register the same name: the choice must not depend on the order of installation.
    """
    entries = {name: Entry(name, target, HOME) for name, target in BUILTIN[kind].items()}
    for point in _installed(f"agsm_rl.{kind}", tuple(sys.path)):
        entry = Entry(point.name, point.value, _package(point))
        known = entries.get(entry.name)
        if known is None:
            entries[entry.name] = entry
        elif (known.target, known.package) != (entry.target, entry.package):
            raise UserError(
                f"{kind}: the name '{entry.name}' is registered by two packages, {known.package} ({known.target}) and "
                f"{entry.package} ({entry.target}); uninstall one, or have its author rename the entry point."
            )
    return dict(sorted(entries.items()))


def entry_of(kind: str, name: str, *, where: str) -> Entry:
    """What is registered under a name, not imported yet; UserError, which names `where`, if nothing is."""
    entries = available(kind)
    if name not in entries and (kind, name) in OUT_OF_SCOPE:
        raise UserError(f"{where}: '{name}' {OUT_OF_SCOPE[kind, name]}")
    if name not in entries:
        raise unknown_name(where, name, NOUNS[kind], entries)
    return entries[name]


@cache
def _installed(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of a group; looked up once for each `sys.path`, since it takes all packages' metadata."""
    return tuple(entry_points(group=group))


def load(kind: str, name: str, *, where: str, allow_imports: Collection[str] = ()) -> Any:
    """The class registered under a name; `where` is the place in the recipe, for messages.

    `name` may be `module:Class` if `allow_imports` contains the module or one of its parent packages.
    """
    if ":" in name:
        _check_allowed(name, where=where, allow_imports=allow_imports)
        _add_working_folder()
        return _import(name, where=where, source=f"--allow-import {name.partition(':')[0]}")
    entry = entry_of(kind, name, where=where)
    return _import(entry.target, where=where, source=f"the package {entry.package}")


def permissions(
    *,
    imports: Iterable[str] | None = (),
    commands: Iterable[str] | None = (),
    hosts: Iterable[str] | None = (),
    variables: Iterable[str] | None = (),
) -> frozenset[str]:
    """The permissions of the command line, as `allow_imports` takes them: modules, `command:…`, `host:…`, `env:…`.

    A module name has no colon, so the kinds of permission cannot be confused.
    """
    modules = frozenset(imports or ())
    if wrong := [name for name in modules if ":" in name]:
        raise UserError(f"--allow-import {wrong[0]}: give only the module, {wrong[0].partition(':')[0]}")
    others = {"command": commands, "host": hosts, "env": variables}
    return modules | {f"{kind}:{text}" for kind, texts in others.items() for text in texts or ()}


def permission_flags(granted: Iterable[str]) -> str:
    """The options of the command line that grant these permissions, each after a space."""
    flags = [wanted.partition(":")[::2] if ":" in wanted else ("import", wanted) for wanted in sorted(granted)]
    return "".join(f" --allow-{kind} {shlex.quote(what)}" for kind, what in flags)


ACTIONS = {
    "command": "runs {}",
    "host": "sends images and prompts to {}",
    "env": "sends the value of your environment variable {}",
}
"""The action that each kind of permission allows."""


def check_permissions(
    registered: Any, options: Mapping[str, Any], *, where: str, allow_imports: Collection[str]
) -> None:
    """Raise a UserError unless all permissions that a class needs with these options have been granted."""
    try:
        needed = permissions_needed(registered, options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    missing = [wanted.partition(":")[::2] for wanted in needed if wanted not in allow_imports]
    if missing:
        actions = " and ".join(ACTIONS[kind].format(what) for kind, what in missing)
        flags = " ".join(f"--allow-{kind} {shlex.quote(what)}" for kind, what in missing)
        raise UserError(
            f"{where}: this {actions}, which a recipe may not do by itself. If you trust it, add {flags} to the "
            "command."
        )


def permissions_needed(registered: Any, options: Mapping[str, Any]) -> list[str]:
    """The result of a class's static method `permissions(options)`; empty if it has none."""
    return list(getattr(registered, "permissions", lambda options: ())(options))


def names_that(kind: str, accept: Any) -> list[str]:
    """The registered names whose class passes `accept`; classes that cannot be imported are skipped."""
    accepted = []
    for name in available(kind):
        try:
            if accept(load(kind, name, where=name)):
                accepted.append(name)
        except UserError:
            continue
    return accepted


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown package"


def _check_allowed(name: str, *, where: str, allow_imports: Iterable[str]) -> None:
    module = name.partition(":")[0]
    if not any(module == allowed or module.startswith(allowed + ".") for allowed in allow_imports):
        raise UserError(
            f"{where}: '{name}' is not registered, and a recipe may not run other code by itself. If you trust it, add "
            f"--allow-import {module} to the command."
        )


def _add_working_folder() -> None:
    """Make modules in the working folder importable. It goes last on the path, so it cannot shadow installed ones."""
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)


def _import(target: str, *, where: str, source: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        raise UserError(f"{where}: {source} names {target}, but importing it failed: {error}") from error
    except AttributeError as error:
        raise UserError(f"{where}: {source} names {target}, but {module} has no '{attribute}'.") from error
    except (Exception, SystemExit) as error:  # other people's modules may raise anything when imported
        raise UserError(
            f"{where}: {source} names {target}, but importing it failed: {type(error).__name__}: {error}"
        ) from error
