"""Files made to harm: nothing in them runs, and nothing is written outside the folders that the user named."""

import json
import pickle
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bad_input import assert_refused, picture
from safetensors.torch import load_file, save_file

INTRUDER = "open({path!r}, 'w').write('ran')\nclass Thing:\n    def __init__(self, *a, **k): pass\n"


@pytest.fixture
def mark(tmp_path) -> Path:
    """A file that is there when a stranger's code has run; `intruder.py` lies in the working folder."""
    path = tmp_path / "it-ran"
    (tmp_path / "intruder.py").write_text(INTRUDER.format(path=str(path)))
    return path


class Trap:
    """Leaves the mark where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


PLACES = [
    "objectives.0.use={code}",
    "objectives.0.source.use={code}",
    "objectives.0.view={{use: '{code}'}}",
    "backbone.use={code}",
    "adapters.lora.use={code}",
    "evaluate={{rewards: ['{code}']}}",
    "objectives.0={{use: ddpo, source: {{use: rollouts, prompts: p.txt, rewards: {{'{code}': 1.0}}}}}}",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("code", ["os:system", "intruder:Thing"])
def test_a_recipe_cannot_name_code(train, content, mark, tmp_path, place, code):
    result = train(content, "--set", place.format(code=code))
    assert_refused(result, code, f"--allow-import {code.partition(':')[0]}", folder=tmp_path / "run")
    assert not mark.exists()


TAGS = [
    "!!python/object/apply:os.system ['touch it-ran']",
    "!!python/object/new:os.system ['touch it-ran']",
    "!!python/name:os.system",
    "!!python/module:intruder",
    "!!python/object:intruder.Thing {}",
    "!Thing {}",
]


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_tags_construct_nothing(train, command, content, mark, tmp_path, tag):
    assert_refused(train(f"steps: {tag}\n"), "line 1", "tags", folder=tmp_path / "run")
    assert_refused(train(content, "--set", f"steps={tag}"), "tags", folder=tmp_path / "run")
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "recipe.yaml").write_text(f"backbone: {tag}\n")
    assert_refused(command("sample", "given", "a red star"), "tags")
    assert_refused(command("doctor", "given"), "tags")
    assert not mark.exists()


def test_yaml_bombs_are_refused_at_once(train, tmp_path):
    lists = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30))]
    maps = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 30))]
    began = time.monotonic()
    assert_refused(train("\n".join(lists)), "aliases", "100,000", folder=tmp_path / "run")
    assert_refused(train("\n".join(maps)), "merging", folder=tmp_path / "run")
    assert_refused(train("x: " + "a" * 1_100_000), "1,000,000", folder=tmp_path / "run")
    assert_refused(train("steps: " + "9" * 10_000), "x.yaml", folder=tmp_path / "run")
    assert time.monotonic() - began < 60


def pickle_file(tmp_path: Path, mark: Path, name: str) -> str:
    (tmp_path / name).write_bytes(pickle.dumps(Trap(mark)))
    return str(tmp_path / name)


OPTIONS = {
    "backbone.checkpoint={file}": ("model.ckpt", "only .safetensors"),
    "backbone.checkpoint={file} ": ("model.safetensors", "cannot be loaded"),
    "backbone.unet={file}": ("unet.bin", "cannot be loaded"),
    "backbone.lora={file}": ("lora.bin", "cannot be loaded"),
    "backbone.lora={file} ": ("lora.safetensors", "cannot be loaded"),
    "start_from={file}": ("start.safetensors", "not safetensors"),
    "start_from={file} ": ("start.pt", "not safetensors"),
    "objectives.0.source.dataset={file}": ("data.pkl", "it is a single .pkl"),
    "objectives.0.source.dataset={file} ": ("data.parquet", "cannot be opened"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_pickles_in_a_recipe_s_files_do_not_run(train, content, mark, tmp_path, option):
    name, words = OPTIONS[option]
    file = pickle_file(tmp_path, mark, name)
    assert_refused(train(content, "--set", option.strip().format(file=file)), words, folder=tmp_path / "run")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.pth", "x.ckpt", "x.bin"])
def test_pickles_in_the_commands_files_do_not_run(command, mark, tmp_path, name):
    file = pickle_file(tmp_path, mark, name)
    assert_refused(command("sample", file, "a red star"))
    assert_refused(command("eval", file, "--num-images", 1))
    assert_refused(command("sample", file, "a red star", "--base", "builtin:shapes-sd15"))
    assert_refused(command("convert", file, "out.safetensors"))
    assert_refused(command("convert", file, "folder", "--to", "agsm"))
    assert not mark.exists()
    assert not (tmp_path / "out.safetensors").exists() and not (tmp_path / "folder").exists()


def test_pickled_weights_in_a_pipeline_folder_do_not_run(train, content, mark, tmp_path, tiny_checkpoint):
    for part, name in {
        "unet": "diffusion_pytorch_model",
        "text_encoder": "model",
        "vae": "diffusion_pytorch_model",
    }.items():
        base = shutil.copytree(tiny_checkpoint, tmp_path / part)
        (base / part / f"{name}.safetensors").unlink()
        (base / part / f"{'pytorch_model' if part == 'text_encoder' else name}.bin").write_bytes(
            pickle.dumps(Trap(mark))
        )
        content["backbone"]["checkpoint"] = str(base)
        assert_refused(train(content), "cannot be loaded", folder=tmp_path / "run")
    assert not mark.exists()


CODE_IN_MODELS = {
    "a module of the folder's own": lambda index: index | {"unet": ["my_unet", "Thing"]},
    "a pipeline of the folder's own": lambda index: index | {"_class_name": ["my_unet", "Thing"]},
    "a library by its name": lambda index: index | {"unet": ["intruder", "Thing"]},
}


@pytest.mark.parametrize("case", CODE_IN_MODELS)
def test_code_in_a_model_s_folder_does_not_run(train, content, mark, tmp_path, tiny_checkpoint, case):
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    for folder in (base, base / "unet"):
        shutil.copy(tmp_path / "intruder.py", folder / "my_unet.py")
    index = base / "model_index.json"
    index.write_text(json.dumps(CODE_IN_MODELS[case](json.loads(index.read_text()))))
    content["backbone"]["checkpoint"] = str(base)
    assert_refused(train(content), "backbone.checkpoint", folder=tmp_path / "run")
    assert not mark.exists()


def test_auto_map_runs_nothing_and_trust_remote_code_is_no_option(train, content, mark, tmp_path, tiny_checkpoint):
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    shutil.copy(tmp_path / "intruder.py", base / "text_encoder" / "intruder.py")
    config = base / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "intruder.Thing"}}))
    content["backbone"]["checkpoint"] = str(base)
    assert_refused(train(content, "--set", "steps=1"), "text_encoder", "auto_map")
    assert not mark.exists()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": None}))
    for option in ("backbone", "objectives.0.source"):
        assert_refused(
            train(content, "--set", f"{option}.trust_remote_code=true"), "'trust_remote_code' is not an option"
        )


def test_a_data_set_s_loading_script_does_not_run(train, content, mark, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(tmp_path / "intruder.py", tmp_path / "data" / "data.py")
    for dataset in ("data", "data/data.py", str(tmp_path / "data")):
        content["objectives"][0]["source"]["dataset"] = dataset
        assert_refused(train(content), "dataset", "images", "table", folder=tmp_path / "run")
    assert not mark.exists()


def test_a_data_set_cannot_read_or_write_outside_its_folder(train, content, tmp_path):
    """Metadata that points upwards, and an archive whose members do."""
    (tmp_path / "secret.png").write_bytes(picture())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.png").write_bytes(picture())
    lines = [json.dumps({"file_name": name, "caption": "a"}) for name in ("0.png", "../secret.png")]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    content["objectives"][0]["source"]["dataset"] = "data"
    assert_refused(train(content), "dataset", folder=tmp_path / "run")
    (tmp_path / "archive").mkdir()
    with zipfile.ZipFile(tmp_path / "archive" / "evil.zip", "w") as archive:
        for name in ("../../escaped.png", "/escaped.png", "a.png"):
            archive.writestr(name, picture())
        archive.writestr("metadata.jsonl", json.dumps({"file_name": "a.png", "caption": "a"}))
    content["objectives"][0]["source"]["dataset"] = "archive"
    train(content)
    assert not list(tmp_path.rglob("escaped.png")) and not list(tmp_path.parent.glob("escaped.png"))
    assert not Path("/escaped.png").exists()


def test_an_export_s_metadata_can_name_neither_code_nor_a_path(train, command, content, mark, tmp_path):
    assert train(content, "--set", "steps=1").exit_code == 0
    tensors = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    from agsm_rl.export.attach import read_export

    _, metadata = read_export(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    for key in ("kind", "backbone"):
        save_file(tensors, tmp_path / "evil.safetensors", metadata | {key: "intruder:Thing"})
        assert_refused(command("sample", "evil.safetensors", "a red star"), "intruder:Thing", "--allow-import")
    save_file(tensors, tmp_path / "evil.safetensors", metadata | {"name": "../../escaped"})
    assert command("convert", "evil.safetensors", "out/x.safetensors", "--to", "kohya").exit_code == 0
    assert not list(tmp_path.rglob("escaped*"))
    assert not mark.exists()


def test_a_stranger_s_run_folder_can_name_no_code(command, train, content, mark, tmp_path):
    assert train(content, "--set", "steps=1").exit_code == 0
    recipe = tmp_path / "run" / "recipe.yaml"
    data = yaml.safe_load(recipe.read_text())
    data["backbone"]["use"] = "intruder:Thing"
    recipe.write_text(yaml.safe_dump(data))
    for words in (["sample", "run", "a red star"], ["eval", "run"], ["doctor", "run"], ["train", recipe, "--resume"]):
        assert_refused(command(*words), "intruder:Thing", "--allow-import intruder")
    assert not mark.exists()


def test_a_checkpoint_whose_tensors_are_a_trap_does_not_run(command, train, content, mark, tmp_path):
    assert train(content, "--set", "steps=1").exit_code == 0
    from agsm_rl.run import checkpoints

    (path,) = (tmp_path / "run" / "checkpoints").glob("*.pt")
    torch.save({"policy": Trap(mark), "step": 1}, path)
    path.with_suffix(".sha256").write_text(checkpoints._digest(path))
    result = command("train", "run/recipe.yaml", "--resume", "--set", "steps=2")
    assert_refused(result, "not a checkpoint of this program")
    assert command("doctor", "run").exit_code == 1
    assert not mark.exists()
