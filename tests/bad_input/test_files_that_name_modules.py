"""What a stranger's folder and files name is not imported: modules beside a recipe, and those that weights ask for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from bad_input import assert_refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from agsm_rl.backbones.model_index import BadPart, check_index
from agsm_rl.compat.trl import DefaultDDPOStableDiffusionPipeline
from agsm_rl.errors import UserError
from agsm_rl.sweep.executors import run_job

NAMES = ("typing", "typer", "yaml", "platform", "random", "torch", "megatron", "optree", "kernels")


def folder_of_impostors(folder: Path) -> Path:
    """Modules called as others are; the file `it-ran` appears when one of them is imported."""
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'it-ran')!r}, 'a').write('{name} ')\n")
    return folder


def run_here(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_python_m_imports_nothing_from_the_current_folder(tmp_path):
    done = run_here(folder_of_impostors(tmp_path), "-m", "agsm_rl", "convert", "missing", "out.safetensors")
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "it-ran").exists(), (tmp_path / "it-ran").read_text()


def test_a_sweep_s_cell_imports_nothing_from_the_current_folder(tmp_path):
    run_job(tmp_path / "job.json", tmp_path / "log", threads=1, cwd=str(folder_of_impostors(tmp_path)))
    assert "job.json" in (tmp_path / "log").read_text()
    assert not (tmp_path / "it-ran").exists(), (tmp_path / "it-ran").read_text()


def test_an_allowed_module_of_the_current_folder_is_still_found(tmp_path):
    (tmp_path / "mine.py").write_text("print('imported')\n")
    done = run_here(tmp_path, "-m", "agsm_rl", "serve-reward", "mine:Reward", "--allow-import", "mine")
    assert "imported" in done.stdout and "has no 'Reward'" in done.stderr


HARMFUL = {
    "megatron_config": {"x": 1},
    "megatron_core": "megatron.stranger",
    "auto_mapping": {"base_model_class": "Stranger", "parent_library": "megatron.stranger"},
    "base_model_name_or_path": "megatron/stranger",
    "runtime_config": {"x": 1},
    "task_type": "megatron.stranger",
}
HANGS = "(([a-z0-9_]+)*\\.?)*!"


@pytest.fixture
def harmful(train, content, tmp_path) -> Path:
    """A run whose LoRA names a module to import and gives its target modules as a regular expression that hangs."""
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "stranger.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w').write('ran')\n")
    assert train(content, "--set", "steps=1").exit_code == 0
    (tmp_path / "run").rename(tmp_path / "first")
    return tmp_path / "first" / "adapter" / "pytorch_lora_weights.safetensors"


def with_options(file: Path, out: Path, *, exported: bool, **changes: Any) -> Path:
    """A copy of a LoRA whose description has more options; without our own metadata unless `exported`."""
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    options = json.loads(metadata["lora_adapter_metadata"])
    options |= {f"unet.{name}": value for name, value in (HARMFUL | changes).items()}
    described = {"lora_adapter_metadata": json.dumps(options)}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(load_file(file), out, metadata | described if exported else described)
    return out


def test_nothing_that_a_lora_names_is_imported_whichever_way_it_comes_in(
    harmful, train, command, content, tmp_path, tiny_checkpoint
):
    theirs = with_options(harmful, tmp_path / "theirs.safetensors", exported=False)
    ours = with_options(harmful, tmp_path / "ours" / "pytorch_lora_weights.safetensors", exported=True)
    fused = content | {"backbone": content["backbone"] | {"lora": str(theirs)}, "steps": 1}
    assert train(fused).exit_code == 0
    assert command("check", "x.yaml").exit_code == 0
    assert command("sample", theirs, "x", "--base", tiny_checkpoint, "--num-steps", "1", "-o", "o").exit_code == 0
    assert command("sample", ours, "x", "--num-steps", "1", "-o", "o").exit_code == 0
    assert train(content | {"start_from": str(ours.parent), "steps": 1}, "--run-dir", "second").exit_code == 0
    assert command("convert", ours, "k.safetensors", "--to", "kohya").exit_code == 0
    assert not (tmp_path / "it-ran").exists()


def test_nothing_that_a_lora_beside_a_trl_pipeline_names_is_imported(harmful, tmp_path, tiny_checkpoint):
    copytree(tiny_checkpoint, tmp_path / "pipeline")
    with_options(harmful, tmp_path / "pipeline" / "pytorch_lora_weights.safetensors", exported=False)
    pipeline = DefaultDDPOStableDiffusionPipeline(str(tmp_path / "pipeline"), use_lora=False)
    assert pipeline.use_lora
    pipeline.prepare(torch.device("cpu"), torch.float32, seed=0)
    assert not (tmp_path / "it-ran").exists()


def test_target_modules_are_never_run_as_a_regular_expression(harmful, command, tmp_path, tiny_checkpoint):
    theirs = with_options(harmful, tmp_path / "theirs.safetensors", exported=False, target_modules=HANGS)
    assert command("sample", theirs, "x", "--base", tiny_checkpoint, "--num-steps", "1", "-o", "o").exit_code == 0
    ours = with_options(harmful, tmp_path / "ours.safetensors", exported=True, target_modules=HANGS)
    assert_refused(command("sample", ours, "x", "-o", "p"), "unet.target_modules", "a list of module names")
    for name in ("rank_pattern", "alpha_pattern"):
        theirs = with_options(harmful, tmp_path / "theirs.safetensors", exported=False, **{name: {HANGS: 2}})
        assert_refused(
            command("sample", theirs, "x", "--base", tiny_checkpoint, "-o", "p"), name, "regular expressions"
        )


COMPONENTS = (
    ["megatron.stranger", "Scheduler"],
    ["subprocess", "Popen"],
    ["transformers", "pipeline"],
    ["transformers", "AutoModel"],
    ["diffusers", "DiffusionPipeline"],
    ["scheduler"],
)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_pipeline_s_index_names_ordinary_classes_of_two_libraries_only(component):
    parts = {"vae": ["diffusers", "AutoencoderKL"], "unet": ["diffusers", "UNet2DConditionModel"]}
    parts |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    named = {"_class_name": "StableDiffusionPipeline", **parts, "scheduler": component}
    with pytest.raises(BadPart, match=r"its scheduler is \['.* in model_index.json"):
        check_index(named, replaced={})
    check_index(named | {"scheduler": ["diffusers", "DDIMScheduler"]}, replaced={})
    check_index(named | {"safety_checker": ["stable_diffusion", "X"]}, replaced={"safety_checker": None} | named)


def test_a_base_that_names_a_library_is_refused_before_it_is_imported(train, content, tmp_path, tiny_checkpoint):
    copytree(tiny_checkpoint, tmp_path / "base")
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w').write('ran')\n")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index | {"scheduler": ["stranger", "Scheduler"]}))
    content["backbone"]["checkpoint"] = str(tmp_path / "base")
    assert_refused(train(content), "its scheduler is ['stranger', 'Scheduler']", folder=tmp_path / "run")
    with pytest.raises(UserError, match="its scheduler is"):
        DefaultDDPOStableDiffusionPipeline(str(tmp_path / "base"))
    assert not (tmp_path / "it-ran").exists()
