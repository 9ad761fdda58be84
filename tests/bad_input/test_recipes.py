"""Recipes that cannot be: each ends with one message that says where, what was got, and what would work."""

import pytest
from bad_input import assert_refused

ROLLOUTS = "{use: rollouts, prompts: builtin:shapes-prompts, rewards: {shapes: 1.0}"
PAIRS = "{use: pairs, dataset: builtin:shapes, batch_size: 2}"
REST = (
    b"backbone: {use: stable_diffusion, checkpoint: 'builtin:shapes-sd15', device: cpu}\n"
    b"objectives: [{use: score_matching, source: {use: pairs, dataset: 'builtin:shapes', batch_size: 2}}]\n"
)

# `--set` of the sound recipe → words of the message.
OVERRIDES = {
    "unknown key": ("stps=1", ["'stps'", "Did you mean 'steps'?"]),
    "unknown key in a section": ("checkpoint.evry=1", ["checkpoint", "'evry'", "'every'"]),
    "unknown option of an objective": ("objectives.0.temprature=1", ["objectives[0]", "'temprature'"]),
    "text for a number": ("steps=ten", ["steps", "'ten'", "integer"]),
    "true for a number": ("steps=true", ["steps", "true", "number"]),
    "a fraction of a step": ("steps=1.5", ["steps", "1.5"]),
    "no steps": ("steps=0", ["steps", "got 0"]),
    "infinite steps": ("steps=1e400", ["steps", "inf"]),
    "a negative seed": ("seed=-1", ["seed", "-1"]),
    "a negative batch": (
        "objectives.0.source.batch_size=-4",
        ["objectives[0].source", "batch_size", "-4", "1 or more"],
    ),
    "an empty batch": ("objectives.0.source.batch_size=0", ["batch_size", "got 0"]),
    "text for a batch": ("objectives.0.source.batch_size=many", ["batch_size", "'many'"]),
    "an impossible pairing": (
        f"objectives.0={{use: ddpo, source: {PAIRS}}}",
        ["objectives[0].source", "'ddpo'", "rollouts"],
    ),
    "a black-box reward to be differentiated": (
        "objectives.0={use: reward_backprop, rewards: {shapes: 1.0}, "
        "source: {use: prompts, prompts: builtin:shapes-prompts}}",
        ["objectives[0]", "'shapes' has no gradient", "brightness"],
    ),
    "a view that does not fit": (
        "objectives.0.view={use: best_images}",
        ["objectives[0].view", "best_images", "rollouts"],
    ),
    "a source that is not there": ("objectives.0.source=mine", ["objectives[0].source", "'mine'", "sources"]),
    "a source that is a list": ("objectives.0.source=[1]", ["objectives[0].source", "[1]"]),
    "a data set that is not there": (
        "objectives.0.source.dataset=./no",
        ["source.dataset", "'./no'", "no such file or folder"],
    ),
    "a future version": ("version=2", ["version", "2", "1"]),
    "a version that is none": ("version=new", ["version", "'new'"]),
    "a learning rate of zero": ("optimizer.learning_rate=0", ["optimizer.learning_rate", "got 0"]),
    "a negative learning rate": ("optimizer.learning_rate=-1e-3", ["optimizer.learning_rate", "-0.001"]),
    "a learning rate that is no number": ("optimizer.learning_rate=.nan", ["optimizer.learning_rate", "nan"]),
    "a rate for no adapter": ("optimizer.learning_rate={lroa: 1e-3}", ["optimizer.learning_rate", "'lora'"]),
    "an EMA that never moves": ("ema.decay=1", ["ema.decay", "less than 1"]),
    "a schedule before the start": ("objectives.0.weight={-5: 1.0}", ["objectives[0].weight", "-5"]),
    "an infinite weight": ("objectives.0.weight=.inf", ["objectives[0].weight", "inf", "finite"]),
    "an adapter to train that is not there": ("objectives.0.trains=[lroa]", ["trains", "'lroa'", "'lora'"]),
    "a range of t that is empty": ("objectives.0.t=[0.9, 0.1]", ["objectives[0].t", "low < high"]),
    "a name that would be a path": ("objectives.0.name=../up", ["objectives[0].name", "../up", "letters"]),
    "an adapter named as a path": ("adapters={../up: {use: lora}}", ["adapters", "../up"]),
    "an unknown objective": ("objectives.0.use=ddppo", ["objectives[0].use", "'ddppo'", "'ddpo'"]),
    "an unknown backbone": ("backbone.use=stable_difusion", ["backbone.use", "stable_diffusion"]),
    "an unknown combiner": ("combine=summ", ["combine", "'summ'", "'sum'"]),
    "an unknown tracker": ("track=[tensorbord]", ["track[0]", "'tensorbord'"]),
    "an unknown dtype": ("backbone.dtype=int8", ["backbone.dtype", "'int8'", "float32"]),
    "a resolution between latents": ("backbone.resolution=17", ["backbone.resolution", "17", "multiple of 8"]),
    "a negative resolution": ("backbone.resolution=-8", ["backbone.resolution", "-8", "positive multiple of 8"]),
    "a resolution that the latents take but the pipeline does not": (
        "backbone.resolution=36",
        ["backbone.resolution", "36", "multiple of 8"],
    ),
    "a resolution beyond all": ("backbone.resolution=80000", ["backbone.resolution", "80000", "at most 8192"]),
    "no resolution": ("backbone.resolution=0", ["backbone.resolution", "0", "positive multiple of 8"]),
    "a dtype that is for drawing": ("backbone.dtype=float16", ["backbone.dtype", "'float16'", "bfloat16"]),
    "a device that is none": ("backbone.device=gpu", ["backbone.device", "'gpu'", "cuda:1"]),
    "a device that is not here": ("backbone.device=cuda:77", ["backbone.device", "cuda:77", "use cpu"]),
    "a seed that no generator takes": ("seed=18446744073709551616", ["seed", "less than or equal to"]),
    "a seed of a part that no generator takes": (
        "adapters.lora.seed=18446744073709551616",
        ["adapters.lora.seed", "less than or equal to"],
    ),
    "an alpha below zero": ("adapters.lora.alpha=-1", ["lora.alpha", "-1", "above 0"]),
    "more tokens than memory": (
        "adapters={tokens: {use: soft_tokens, num_tokens: 100000000000}}",
        ["num_tokens", "100000000000", "1,000,000,000"],
    ),
    "more sampling steps than noise levels": (
        "evaluate={num_steps: 5000}",
        ["evaluate.num_steps", "5000", "less than or equal to 1000"],
    ),
    "more sampling steps in a grid": ("sample.num_steps=1001", ["sample.num_steps", "1001"]),
    "more sampling steps of rollouts": (
        f"objectives.0={{use: ddpo, source: {ROLLOUTS}, num_steps: 1001}}}}",
        ["num_steps", "1001", "1000 steps"],
    ),
    "more noise than a step takes": (
        f"objectives.0={{use: ddpo, source: {ROLLOUTS}, eta: 5}}}}",
        ["eta", "5", "[0, 1]"],
    ),
    "no adapters": ("adapters={}", ["adapters", "nothing would be trained"]),
    "no objectives": ("objectives=[]", ["objectives", "nothing would be learned"]),
    "objectives that are null": ("objectives=null", ["objectives", "null"]),
    "a rank of zero": ("adapters.lora.rank=0", ["adapters.lora", "rank", "0"]),
    "three banks": ("adapters.lora.banks=3", ["banks", "3", "1, 2"]),
    "modules that are not there": ("adapters.lora.target_modules=[nope]", ["target_modules", "nope", "to_q"]),
    "layers of tokens on a U-Net": ("adapters={tokens: {use: soft_tokens, layers: 2}}", ["soft_tokens.layers", "SD3"]),
    "a start that is not there": ("start_from=./gone", ["start_from", "gone"]),
    "a run that starts from itself": ("start_from=run", ["start_from", "run"]),
    "rewards that are none": (
        f"objectives.0={{use: ddpo, source: {ROLLOUTS.replace('{shapes: 1.0}', '{}')}}}}}",
        ["rewards"],
    ),
    "a weight of a reward in words": (
        f"objectives.0={{use: ddpo, source: {ROLLOUTS.replace('1.0', 'much')}}}}}",
        ["rewards.shapes", "'much'"],
    ),
    "updates that do not divide": (
        f"objectives.0={{use: ddpo, source: {ROLLOUTS}, updates: 7}}}}",
        ["objectives[0].source", "updates 7"],
    ),
    "groups of one": (
        f"objectives.0={{use: ddpo, source: {ROLLOUTS}, images_per_prompt: 1, advantages: group}}}}",
        ["images_per_prompt", "2"],
    ),
    "AGSM's groups that do not divide": (
        f"objectives.0={{use: agsm, group_size: 4, source: {PAIRS.replace('2}', '6}')}}}",
        ["objectives[0]", "batch_size 6", "group_size 4"],
    ),
    "an evaluation without guidance": ("evaluate={guidance: []}", ["evaluate.guidance"]),
    "a suite that is not there": ("evaluate={suite: shaps}", ["evaluate.suite", "'shaps'"]),
    "a negative checkpoint interval": ("checkpoint.every=-1", ["checkpoint.every", "-1"]),
    "a step beyond all": ("steps=1000000000000", ["'steps' is 1000000000000", "1,000,000,000"]),
    "a step of very many digits": ("steps=" + "9" * 5000, ["--set", "5000 digits"]),
    "a rank beyond all": ("adapters.lora.rank=1000000000000000000", ["adapters.lora", "'rank'", "1,000,000,000"]),
    "a large rank": ("adapters.lora.rank=100000", ["adapters.lora", "rank", "100000", "1 to 4096"]),
    "a batch beyond all": ("objectives.0.source.batch_size=10000000000", ["batch_size", "10000000000"]),
    "a large batch": ("objectives.0.source.batch_size=1000000", ["objectives[0].source", "1000000", "65,536"]),
    "a large draw": (
        f"objectives.0={{use: ddpo, source: {ROLLOUTS}, num_prompts: 60000, images_per_prompt: 60000}}}}",
        ["objectives[0].source", "3600000000", "65,536"],
    ),
    "a grid of a million": ("sample.num_images=1000000", ["sample.num_images", "1000000", "1000"]),
    "an evaluation of a billion": ("evaluate={num_images: 1000000000}", ["evaluate.num_images", "1000000"]),
    "a step of a schedule beyond all": ("objectives.0.weight={1000000000000: 1.0}", ["objectives[0].weight", "steps"]),
    "a guidance beyond all": ("sample.guidance=1e300", ["sample.guidance", "1e+300"]),
    "an index that is no digit": ("objectives.²=x", ["--set", "objectives is a list of 1", "'²' is not an index"]),
    "a path of very many keys": ("a." * 5000 + "b=1", ["--set", "key.path=value"]),
    "code by its name": ("objectives.0.use=os:system", ["objectives[0].use", "'os:system'", "--allow-import os"]),
}

TEXTS = {
    "an empty file": (b"", ["x.yaml", "mapping", "empty"]),
    "a list": (b"- steps: 1\n", ["x.yaml", "mapping", "list"]),
    "a scalar": (b"train please\n", ["x.yaml", "mapping", "str"]),
    "a key twice": (b"steps: 1\nsteps: 2\n", ["line 2", "'steps' is given twice"]),
    "a bracket that is open": (b"steps: [1\n", ["x.yaml", "line"]),
    "a tab": (b"steps:\n\t- 1\n", ["x.yaml", "line 2"]),
    "a sequence that contains itself": (b"steps: &a [*a]\n", ["x.yaml", "contains itself"]),
    "a mapping that contains itself": (b"backbone: &a {use: *a}\n", ["x.yaml", "contains itself"]),
    "an alias of nothing": (b"steps: *gone\n", ["line 1", "gone"]),
    "Latin-1": ("# für dich\nsteps: 1\n".encode("latin-1"), ["x.yaml", "is not text in UTF-8"]),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00", ["x.yaml", "is not text in UTF-8"]),
    "a null byte": (b"steps: \x00\n", ["x.yaml", "not valid YAML"]),
    "nested too deeply": (b"a: " + b"[" * 5000 + b"]" * 5000, ["x.yaml", "not valid YAML"]),
    "nested thirty levels too deeply": (b"a: " + b"[" * 62 + b"]" * 62, ["x.yaml", "32 levels deep"]),
    "a missing key": (b"steps: 1\n", ["backbone", "required"]),
    "a hexadecimal number without end": (b"steps: 0x" + b"f" * 6000, ["line 1", "6002 digits"]),
    "a sexagesimal number without end": (b"steps: 1" + b":1" * 100_000, ["steps: got", "valid integer"]),
    "a float of many digits": (b"seed: 0." + b"1" * 6000, ["line 1", "6002 digits"]),
    "an int of nothing": (b"steps: !!int ''", ["not valid YAML"]),
    "a bool that is none": (b"steps: !!bool maybe", ["not valid YAML"]),
    "bytes": (b"steps: !!binary aGk=", ["line 1", "YAML tags"]),
    "a set": (b"steps: !!set {a, b}", ["line 1", "YAML tags"]),
    "a date by its tag": (b"steps: !!timestamp 2001-01-01", ["line 1", "YAML tags"]),
    "a date": (b"steps: 2001-01-01\n" + REST, ["steps", "'2001-01-01'", "integer"]),
    "no number": (b"steps: .nan\n" + REST, ["steps", "nan"]),
    "a key that is a number": (b"1: 2\n" + REST, ["'1' is not an option"]),
    "a key that is null": (b"~: 2\n" + REST, ["'None' is not an option"]),
    "a key that is no number": (b".nan: 2\n" + REST, ["'nan' is not an option"]),
    "a key that is a list": (b"? [a, b]\n: 2\n" + REST, ["line 1", "unhashable"]),
    "a key of a block that is a number": (b"steps: 1\nadapters: {lora: {use: lora, 1: 2}}\n" + REST, ["adapters.lora"]),
    "a tag without a name": (b"steps: !<> 1", ["x.yaml"]),
    "two documents": (b"steps: 1\n---\nsteps: 2\n", ["line 2", "another document"]),
    "a text of a megabyte": (b"steps: '" + b"x" * 900_000 + b"'\n" + REST, ["steps", "integer"]),
    "a name of a megabyte": (
        b"steps: 1\nadapters: {lora: {use: lora}}\ncombine: " + b"x" * 900_000 + b"\n" + REST,
        ["combine"],
    ),
    "a key of a megabyte": (b"? " + b"x" * 900_000 + b"\n: 1\n" + REST, ["is not an option"]),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_an_impossible_value_is_refused(train, content, tmp_path, case):
    override, words = OVERRIDES[case]
    place = [] if "--set" in words else ["x.yaml"]
    assert_refused(train(content, "--set", override), *place, *words, folder=tmp_path / "run")


@pytest.mark.parametrize("case", TEXTS)
def test_a_file_that_is_no_recipe_is_refused(train, tmp_path, case):
    text, words = TEXTS[case]
    assert_refused(train(text), *words, folder=tmp_path / "run")


def test_a_recipe_that_is_a_folder_or_not_there_is_refused(command, tmp_path):
    (tmp_path / "x.yaml").mkdir()
    assert_refused(command("train", "x.yaml"), "x.yaml", "is a folder", "recipe.yaml")
    assert_refused(command("train", "y.yaml"), "y.yaml", "no such recipe")
    assert_refused(command("train", "builtin:agms"), "builtin:agms", "Did you mean 'builtin:agsm'?")
    assert not (tmp_path / "runs").exists()


def test_resuming_what_is_not_there_is_refused_rather_than_started(train, content, tmp_path):
    assert_refused(train(content, "--resume"), "run", "no run in it to resume", folder=tmp_path / "run")
