"""The keys of a recipe and their types. The options inside blocks are checked by options.py and resolve.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from agsm_rl.recipe.options import Section, Seed
from agsm_rl.recipe.sections import CheckpointKeys, Ema, GradientMapKeys, StopRule, WatchKeys, WeightKeys
from agsm_rl.recipe.values import Guidances, Name, NoiseRange, Rate, Weight
from agsm_rl.training.limits import MAX_BATCH, MAX_IMAGES, MAX_SAMPLING_STEPS
from agsm_rl.training.sizes import PictureSize


def _source(value: Any) -> Any:
    if not isinstance(value, str | dict | Block):
        raise ValueError(f"a source is a name from `sources:`, or a block {{use: name, …}}; got {value!r}")
    return value


def _named(value: Any) -> Any:
    """Turn a name into a block with default options."""
    return {"use": value} if isinstance(value, str) else value


class Block(Section):
    """`{use: name, …}`: a registered name, and options that are checked against the signature of its constructor.

    Args:
        use: Registered name (`agsm-rl list`), or `module:Class` with `--allow-import module`.
    """

    model_config = ConfigDict(extra="allow")

    use: str

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self.model_extra or {})


class TermBlock(Block):
    """An objective in the run. The objective's own options go beside these keys.

    Args:
        name: Name of the term in metrics: letters, digits, _ and -. Null: the objective's name, with a number if
            several terms would share it.
        source: Name of a source from `sources`, or a source's own block.
        view: A block that selects what the term sees of the source's batch. Null: all of it.
        weight: Factor of the term's gradient: a number, or a schedule {step: number}, interpolated linearly.
        every: The term learns in one of every this many steps.
        offset: The first step in which the term learns, counted from 0, so that terms can alternate.
        t: Range [low, high] within [0, 1] of the noise levels that the term draws; 0 is clean. Not for objectives that
            learn from sampling steps.
        trains: Names of the adapters that the term trains. Null: all. An adapter that no term trains stays frozen.
    """

    name: Name | None = None
    source: Annotated[str | Block, BeforeValidator(_source)]
    view: Block | None = None
    weight: Weight = 1.0
    every: int = Field(1, ge=1)
    offset: int = Field(0, ge=0)
    t: NoiseRange = (0.0, 1.0)
    trains: Annotated[list[str], Field(min_length=1)] | None = None


class Optimizer(Block):
    """The optimizer over the trained adapters, and its learning rate.

    Args:
        use: Name of the optimizer: `adamw`, `adamw_8bit`, `prodigy`, `adafactor` or `muon`.
        learning_rate: One number, or {adapter: number} with one for each trained adapter. The default is 1 with
            `prodigy`.
        schedule: Schedule of the learning rate: a name, or a block {use: name, …}. Default: `constant`.
        weight_decay: Decoupled weight decay.
        betas: Decay rates of the averages of the gradient and of its square.
        max_grad_norm: Clip the combined gradient to this norm. Null: no clipping.
    """

    use: str = "adamw"
    learning_rate: Rate | dict[str, Rate] = 1e-3
    schedule: Annotated[Block, BeforeValidator(_named)] = Block(use="constant")
    weight_decay: float = Field(1e-4, ge=0, le=1e6)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0


def _measured_rewards(value: Any) -> Any:
    """A list of names, or {name: options}; a number in place of the options is explained."""
    for name, options in value.items() if isinstance(value, dict) else ():
        if options is not None and not isinstance(options, dict):
            raise ValueError(
                f"'{name}' is {options!r}, but rewards are only measured here and have no weight; write "
                f"{name}: {{}}, with any options inside the braces"
            )
    return value


MeasuredRewards = Annotated[list[str] | dict[str, dict[str, Any] | None], BeforeValidator(_measured_rewards)]


UNKNOWN_BATCH = 24
"""Images that an evaluation draws at once on a CPU, and where a GPU's memory cannot be predicted."""


class SuiteBlock(Block):
    """A suite in `evaluate.suites`. The suite's own options, such as `num_images`, go beside these keys.

    Args:
        use: Registered name of the suite (`agsm-rl list suites`), or `module:Class` with `--allow-import module`.
        rewards: Rewards to measure on the suite's images: a list of names, or {name: {use, options…}}. They have no
            weight. For `rewards`, they are the suite.
        final_only: Measure the suite at the end of the run only.
    """

    rewards: MeasuredRewards = []
    final_only: bool = False


class Evaluate(Section):
    """Compare the base and the trained model on the same prompts and noise, during the run and at its end.

    The long form names suites: `suites: {mine: {use: rewards, prompts: prompts.txt, rewards: {clip_score: {}}}}`. Rules
    (`checkpoint.best`, `stop_when`, `watch`) use the first guidance, and name a score `mine/clip_score`. Without
    `suites`, the shapes world's prompts and judge are used, with `num_images` and `rewards` from here.

    Args:
        suites: The suites by name, `{name: {use: …}}`; one that is null is left out. Null: `shapes` by the short form.
        suite: Short form: the suite of prompts and judgements, the shapes world.
        every: Evaluate every this many steps. Null: at the end only.
        num_images: Short form: images per model and guidance.
        rewards: Short form: further rewards to measure: a list of names, or {name: {use, options…}}. They have no
            weight.
        guidance: Guidance scale, or a list of several.
        num_steps: Denoising steps per image.
        split: The split to take the drawn worlds' prompts from, in `shapes`, `scenes` and lists `builtin:…-prompts`. In
            a sweep, it also names the evaluation: scores on `validation` may choose, those on `held_out` are reported.
        bank: Bank that the trained model draws with. `negative` uses ψ⁻ for both branches of guidance, the paper's
            ablation.
        guidance_bank: Bank of the trained model's unconditional branch, `positive` or `negative`; the conditional
            branch keeps ψ⁺. Null: as the adapters say (`guidance_bank` of `soft_tokens`).
        guidance_prompt: Prompt of that branch, `empty` or the `same`. Null: as the adapters say.
        prompt_suffix: Text appended to each prompt for both models (", best quality"). Images are judged by the prompt
            without it. Sample grids do not use it.
        seed: Seed of the noise; the first image of prompt i has seed + i.
        batch_size: Images to draw at once. Null: on a GPU as many as its free memory holds, 64 at most; on a CPU 24.
            Several processes share the batches (null: at least one for each).
        resolution: Pixels per side, or [height, width], of the images. Null: the backbone's. A drawn world, such as
            `shapes`, is always drawn at the backbone's.
        keep_base: Keep the base's figures in the cache, and read those that an earlier run or sweep has kept there for
            the same base and settings. False: measure the base again.
    """

    suites: Annotated[dict[Name, SuiteBlock], Field(min_length=1)] | None = None
    suite: Literal["shapes"] = "shapes"
    every: Annotated[int, Field(ge=1)] | None = None
    num_images: int = Field(200, ge=1, le=MAX_IMAGES)
    rewards: MeasuredRewards = []
    guidance: Guidances = [3.0]
    num_steps: int = Field(20, ge=1, le=MAX_SAMPLING_STEPS)
    split: Literal["train", "validation", "held_out"] = "held_out"
    bank: Literal["positive", "negative"] = "positive"
    guidance_bank: Literal["positive", "negative"] | None = None
    guidance_prompt: Literal["empty", "same"] | None = None
    prompt_suffix: str = ""
    seed: Seed = 0
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH)] | None = None
    resolution: PictureSize | None = None
    keep_base: bool = True

    @field_validator("suites", mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        return {name: block for name, block in value.items() if block is not None} if isinstance(value, dict) else value

    @field_validator("suite", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "shapes":
            raise ValueError(
                f"'{value}': the short form knows the suite shapes only; write suites: {{{value}: {{use: {value}, …}}}}"
            )
        return value

    @model_validator(mode="after")
    def _one_form(self) -> Evaluate:
        both = [key for key in SHORT_FORM if key in self.model_fields_set]
        if self.suites is not None and both:
            raise ValueError(f"'{both[0]}' belongs to the short form; with `suites`, each suite has its own options")
        return self

    @model_serializer(mode="wrap")
    def _given_form(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The keys of the form that is used."""
        data: dict[str, Any] = handler(self)
        unused = ("suites",) if self.suites is None else SHORT_FORM
        return {key: value for key, value in data.items() if key not in unused}

    @property
    def drawn_at_once(self) -> int:
        """Images of the largest batch, as far as the recipe tells."""
        most = self.batch_size or UNKNOWN_BATCH
        known = [block.options.get("num_images") for block in self.blocks.values()]
        return min(most, max(number or most for number in known))

    @property
    def blocks(self) -> dict[str, SuiteBlock]:
        """The suites by name; the short form is one suite."""
        if self.suites is not None:
            return self.suites
        options = {"num_images": self.num_images, "split": self.split, "seed": self.seed}
        return {self.suite: SuiteBlock(use=self.suite, rewards=self.rewards, **options)}


SHORT_FORM = ("suite", "num_images", "rewards")
"""Keys of `evaluate` that describe its only suite where there is no `suites`."""


class Samples(Section):
    """Draw grids of images into samples/ during the run, always from the same prompts and noise.

    Args:
        every: Draw a grid every this many steps; the base's, of step 0, is drawn before the first.
        prompts: Prompts of the grid: a list, or a file or data set of prompts, as in `rollouts`, of which the first
            `num_images` are taken. Null: the first prompts of the evaluated suite; without a suite, no grid.
        prompt_column: The column that holds the prompts, where `prompts` is a table. Null: `prompt`, `caption` or
            `text`.
        prompt_split: Split of the data set that `prompts` names. Null: its first.
        prompt_config: Configuration of that data set, where it has several.
        num_images: Images in the grid; prompts are repeated if there are fewer.
        guidance: Guidance scale, or a list of several: a grid shows the images of each.
        guidance_bank: Bank of guidance's unconditional branch, `positive` or `negative`. Null: as the adapters say.
        guidance_prompt: Prompt of that branch, `empty` or the `same`. Null: as the adapters say.
        num_steps: Denoising steps per image.
        seed: Seed of the noise; image i has seed + i.
        resolution: Pixels per side, or [height, width], of the images. Null: the backbone's.
    """

    every: int = Field(100, ge=1)
    prompts: Annotated[list[str], Field(min_length=1)] | Annotated[str, Field(min_length=1)] | None = None
    prompt_column: str | None = None
    prompt_split: str | None = None
    prompt_config: str | None = None
    num_images: int = Field(8, ge=1, le=1000)
    guidance: Guidances = [3.0]
    guidance_bank: Literal["positive", "negative"] | None = None
    guidance_prompt: Literal["empty", "same"] | None = None
    num_steps: int = Field(20, ge=1, le=MAX_SAMPLING_STEPS)
    seed: Seed = 0
    resolution: PictureSize | None = None

    @model_validator(mode="after")
    def _columns_belong_to_a_file(self) -> Samples:
        given = [key for key in ("prompt_column", "prompt_split", "prompt_config") if getattr(self, key) is not None]
        if given and not isinstance(self.prompts, str):
            raise ValueError(f"{given[0]} is for a file or data set of prompts; name one as `prompts`, or leave it out")
        return self


class RecipeKeys(Section):
    """The keys of a recipe with their defaults. The options inside blocks are checked later.

    Args:
        version: Version of the format.
        seed: Random seed of the run. The same seed gives the same run.
        steps: Number of optimiser steps.
        backbone: The frozen base model, a block.
        adapters: The adapters to train: {name: block}.
        start_from: A run folder, or a folder of exported adapters, to start from. Adapters that it lacks start fresh.
        reference: What an anchor, a KL or preferences measure from: the `base`, all adapters off; or `start_from`, its
            adapters as loaded and new ones off.
        ema: The moving average of the adapters.
        sources: Sources that several terms can share: {name: block}.
        objectives: The terms: what to learn, from which source, with which weight.
        weights: What the terms' weights mean: factors of the losses, or lengths of the gradients.
        combine: How to combine the terms' gradients: `sum`, or TorchJD's `upgrad`, `pcgrad`, `mgda`, `cagrad`.
        gradient_map: Whether to look where in the model the terms agree or fight, for the report.
        optimizer: The optimizer, its learning rate and its schedule.
        evaluate: Evaluation of the run. Null: none.
        sample: Grids of sample images.
        checkpoint: When to write checkpoints, and which to keep.
        export: Which parameters to export to adapter/: the `live` ones, or their `ema`.
        stop_when: Rules that end the run: {score: rule}.
        watch: What to do when numbers go wrong.
        track: Trackers to send the metrics to, from accelerate: tensorboard, wandb, … An empty list: none.
    """

    version: Literal[1] = 1
    seed: Seed = 0
    steps: int = Field(ge=1)
    backbone: Block
    adapters: dict[Name, Block]
    start_from: str | None = None
    reference: Literal["base", "start_from"] = "base"
    ema: Ema = Ema()
    sources: dict[Name, Block] = {}
    objectives: list[TermBlock]
    weights: WeightKeys = WeightKeys()
    combine: str = "sum"
    gradient_map: GradientMapKeys = GradientMapKeys()
    optimizer: Optimizer = Optimizer()
    evaluate: Evaluate | None = None
    sample: Samples = Samples()
    checkpoint: CheckpointKeys = CheckpointKeys()
    export: Literal["live", "ema"] = "live"
    stop_when: dict[str, StopRule] = {}
    watch: WatchKeys = WatchKeys()
    track: list[str] = ["tensorboard"]

    @field_validator("adapters", "objectives")
    @classmethod
    def _not_empty(cls, value: Any, info: Any) -> Any:
        if not value:
            missing = {
                "adapters": "it is empty, so nothing would be trained; add one, e.g. {lora: {use: lora, rank: 8}}",
                "objectives": "it is empty, so nothing would be learned; add one, e.g. [{use: agsm, source: …}]",
            }
            raise ValueError(missing[info.field_name])
        return value

    @property
    def trained(self) -> list[str]:
        """The adapters that at least one term trains. The others stay as they are in `start_from`."""
        return [name for name in self.adapters if any(name in (term.trains or [name]) for term in self.objectives)]

    def source_of(self, index: int) -> tuple[Block, str]:
        """The block of a term's source, and its place in the recipe."""
        source = self.objectives[index].source
        if isinstance(source, str):
            return self.sources[source], f"sources.{source}"
        return source, f"objectives[{index}].source"

    def to_data(self) -> dict[str, Any]:
        """The recipe as plain data; `from_data` reads it back."""
        data: dict[str, Any] = self.model_dump(mode="json")
        # JSON would turn a schedule's steps into strings.
        for term, block in zip(data["objectives"], self.objectives, strict=True):
            term["weight"] = block.weight
        return data
