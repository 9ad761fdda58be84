"""LoRA files of every form are read whole, to the same additions, or refused with what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file as save_as_they_are
from tiny_pipelines import tiny_unet
from torch import Tensor

from agsm_rl.adapters.lora_files import read_lora
from agsm_rl.adapters.lora_names import LayerNames
from agsm_rl.errors import UserError

RANK = 2
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1."
MODULES = [f"{ATTENTION}{end}" for end in ("to_q", "to_k", "to_v", "to_out.0")]


def save_file(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    save_as_they_are({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file, metadata)


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


def weights(unet: Any, modules: list[str] = MODULES) -> dict[str, tuple[Tensor, Tensor]]:
    """module → down, up."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for module in modules:
        size = unet.get_submodule(module)
        down = torch.randn(RANK, size.in_features, generator=generator)
        made[module] = (down, torch.randn(size.out_features, RANK, generator=generator))
    return made


def named(made: dict[str, tuple[Tensor, Tensor]], pattern: str, down: str, up: str) -> dict[str, Tensor]:
    """Tensors under names such as `unet.{module}.` + `lora_A.weight`."""
    tensors = {}
    for module, (first, second) in made.items():
        prefix = pattern.format(module=module, flat=module.replace(".", "_"))
        tensors |= {prefix + down: first, prefix + up: second}
    return tensors


def processors(made: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """As diffusers named them before it used PEFT."""
    tensors = {}
    for module, (down, up) in made.items():
        head, _, end = module.removesuffix(".0").rpartition(".")
        tensors |= {f"unet.{head}.processor.{end}_lora.{name}.weight": w for name, w in (("down", down), ("up", up))}
    return tensors


FORMS = {
    "diffusers": lambda made: named(made, "unet.{module}.", "lora_A.weight", "lora_B.weight"),
    "without a prefix": lambda made: named(made, "{module}.", "lora_A.weight", "lora_B.weight"),
    "diffusers, lora.down": lambda made: named(made, "unet.{module}.", "lora.down.weight", "lora.up.weight"),
    "attention processors": processors,
    "ComfyUI": lambda made: named(made, "diffusion_model.{module}.", "lora_A.weight", "lora_B.weight"),
    "kohya": lambda made: named(made, "lora_unet_{flat}.", "lora_down.weight", "lora_up.weight"),
    "kohya, original names": lambda made: {
        name.replace("mid_block_attentions_0", "middle_block_1"): tensor
        for name, tensor in named(made, "lora_unet_{flat}.", "lora_down.weight", "lora_up.weight").items()
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_read_to_the_same_additions_at_a_scale_of_one(form, unet, tmp_path):
    made = weights(unet)
    save_file(FORMS[form](made), tmp_path / "x.safetensors")
    placed = read_lora(tmp_path / "x.safetensors", where="x").place({"unet": unet}, where="x")
    assert {*placed} == {"unet"} and placed["unet"].keys() == made.keys()
    for module, (down, up) in made.items():
        addition = placed["unet"][module]
        assert torch.equal(addition.applied(torch.zeros(len(up), down.shape[1])), up @ down)


def peft_file(folder: Path, made: dict[str, tuple[Tensor, Tensor]], **config: Any) -> Path:
    """What `get_peft_model(unet).save_pretrained` writes."""
    file = folder / "adapter_model.safetensors"
    save_file(named(made, "base_model.model.{module}.", "lora_A.weight", "lora_B.weight"), file)
    written = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": ["to_q"], "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return file


@pytest.mark.parametrize(
    ("config", "alphas"),
    [
        ({}, (6, 6)),
        ({"use_rslora": True}, (6 * RANK**0.5, 6 * RANK**0.5)),
        ({"alpha_pattern": {"to_k": 3}}, (6, 3)),
        (
            {"alpha_pattern": {f"^{ATTENTION}to_k": 3}, "rank_pattern": {"attn1.to_q": RANK}, "lora_dropout": 0.1},
            (6, 3),
        ),
        (
            {"megatron_config": {"a": 1}, "megatron_core": "stranger", "auto_mapping": {"parent_library": "stranger"}},
            (6, 6),
        ),
    ],
)
def test_peft_s_own_form_is_read_with_the_alpha_of_its_configuration(config, alphas, unet, tmp_path):
    file = peft_file(tmp_path, weights(unet), **config)
    placed = read_lora(file, where="x").place({"unet": unet}, where="x")["unet"]
    assert tuple(placed[f"{ATTENTION}{end}"].alpha for end in ("to_q", "to_k")) == alphas


@pytest.mark.parametrize(
    ("config", "unused"),
    [({"alpha_pattern": {"to_k": 3, "to_z": 4}}, "to_z"), ({"rank_pattern": {"nowhere.to_q": RANK}}, "nowhere.to_q")],
)
def test_a_rank_or_an_alpha_of_a_layer_that_is_not_there_is_reported(config, unused, unet, tmp_path, caplog):
    read_lora(peft_file(tmp_path, weights(unet), **config), where="x")
    (message,) = caplog.messages
    assert message.startswith("x: adapter_config.json") and message.endswith(f"no effect: {unused}")


def test_ranks_and_alphas_of_layers_that_are_there_need_no_word(unet, tmp_path, caplog):
    read_lora(peft_file(tmp_path, weights(unet), alpha_pattern={"to_k": 3}, rank_pattern={"to_q": RANK}), where="x")
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": None}, "lora_alpha is None; it must be a finite number above 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": 1e300}, r"lora_alpha is 1e\+300"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"r": 4}, "has rank 2, but adapter_config.json says rank 4"),
        ({"r": 0}, "r is 0; it must be an integer"),
        ({"use_dora": True}, "use_dora is True in adapter_config.json, but .* no lora_magnitude_vector"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base's weights"),
        ({"modules_to_save": ["conv_out"]}, "modules_to_save is"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"alpha_pattern": {"(a+)+!": 3}}, r"alpha_pattern has '\(a\+\)\+!'; .*regular expressions are not"),
        ({"rank_pattern": ["to_q"]}, "rank_pattern is"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(config, message, unet, tmp_path):
    file = peft_file(tmp_path, weights(unet), **config)
    with pytest.raises(UserError, match=message):
        read_lora(file, where="x")


def test_peft_s_form_without_its_configuration_is_refused(unet, tmp_path):
    file = peft_file(tmp_path, weights(unet))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="adapter_config.json, which says the LoRA's scale"):
        read_lora(file, where="x")
    for text in ("{", "[]", "[" * 100_000, '"' + "a" * 1_000_001 + '"', "\0"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match="adapter_config.json"):
            read_lora(file, where="x")


def kohya(made: dict[str, tuple[Tensor, Tensor]], alpha: Any = 4.0) -> dict[str, Tensor]:
    tensors = named(made, "lora_unet_{flat}.", "lora_down.weight", "lora_up.weight")
    return tensors | {f"lora_unet_{module.replace('.', '_')}.alpha": torch.tensor(alpha) for module in made}


def described(**options: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in options.items()})}


def test_an_alpha_comes_from_its_tensor_or_the_metadata_and_both_must_agree(unet, tmp_path):
    made, file = weights(unet), tmp_path / "x.safetensors"
    save_file(kohya(made), file, {"ss_network_alpha": "1"})  # of a file whose alphas were changed since
    assert {layer.alpha for layer in read_lora(file, where="x").layers.values()} == {4.0}
    save_file(FORMS["diffusers"](made), file, described(r=RANK, lora_alpha=5, alpha_pattern={f"{ATTENTION}to_k": 7}))
    layers = read_lora(file, where="x").layers
    assert (layers[f"unet.{ATTENTION}to_q"].alpha, layers[f"unet.{ATTENTION}to_k"].alpha) == (5, 7)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 6}))
    with pytest.raises(
        UserError, match="is [57] by the metadata 'lora_adapter_metadata', and 6 by adapter_config.json"
    ):
        read_lora(file, where="x")
    save_file(kohya(made), file)
    with pytest.raises(UserError, match="is 4 by its alpha tensor, and 6 by adapter_config.json"):
        read_lora(file, where="x")
    (tmp_path / "adapter_config.json").unlink()
    save_file(FORMS["kohya"](made), file, {"ss_network_alpha": "1.0"})
    with pytest.raises(UserError, match="has no alpha tensor, which means 2.*'ss_network_alpha' says 1.0"):
        read_lora(file, where="x")
    text = {f"text_encoder.{MODULES[0]}.lora_{end}.weight": w for end, w in zip("AB", made[MODULES[0]], strict=True)}
    save_file(FORMS["diffusers"](made) | text, file, described(r=RANK, lora_alpha=5))
    with pytest.raises(UserError, match="does not give the scale of 'text_encoder"):
        read_lora(file, where="x")


def spoiled(change: Any) -> Any:
    """A LoRA in kohya's form whose first `lora_down` is changed."""

    def make(made: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        tensors = kohya(made)
        name = next(iter(tensors))
        return {**tensors, name: change(tensors[name])}

    return make


def with_more(name: str, tensor: Tensor) -> Any:
    return lambda made: kohya(made) | {name: tensor}


FLAT = f"lora_unet_{MODULES[0].replace('.', '_')}"
REFUSED = {
    "NaN": (spoiled(lambda w: w * float("nan")), "lora_down.weight' holds numbers that are not finite"),
    "too large for float32": (spoiled(lambda w: w.double() * 1e300), "not finite, or too large for float32"),
    "float8": (spoiled(lambda w: w.to(torch.float8_e4m3fn)), "is float8_e4m3fn; allowed: float16"),
    "integers": (spoiled(lambda w: w.long()), "is int64; allowed"),
    "an infinite alpha": (lambda made: kohya(made, float("inf")), "not finite"),
    "an alpha of zero": (lambda made: kohya(made, 0.0), "alpha' is 0.0; it must be a finite number above 0"),
    "an alpha a row": (lambda made: kohya(made, [1.0, 2.0]), r"alpha' has shape \(2,\); it must be a single number"),
    "a rank of zero": (spoiled(lambda w: w[:0]), "with a rank of 1 or more"),
    "another rank above": (spoiled(lambda w: w[:1]), "has weights of shapes"),
    "a scalar": (spoiled(lambda w: w[0, 0]), "has weights of shapes"),
    "half a layer": (
        lambda made: {n: t for n, t in kohya(made).items() if n != f"{FLAT}.lora_up.weight"},
        "half of a la",
    ),
    "an alpha alone": (with_more("lora_unet_conv_in.alpha", torch.tensor(1.0)), "half of a layer.*lora_unet_conv_in"),
    "DoRA of another width": (
        with_more(f"{FLAT}.dora_scale", torch.ones(3, 1)),
        r"DoRA lengths of shape \(3, 1\); .*rows",
    ),
    "DoRA's lengths alone": (with_more("unet.a.lora_magnitude_vector", torch.ones(64)), "half of a layer.*unet.a"),
    "LoHa": (with_more(f"{FLAT}.hada_w1_a", torch.ones(2, 2)), "holds LoHa"),
    "LoKr": (with_more(f"{FLAT}.lokr_w1", torch.ones(2, 2)), "holds LoKr"),
    "Tucker's form": (with_more(f"{FLAT}.lora_mid.weight", torch.ones(2, 2)), "holds LoCon in Tucker's form"),
    "a bias": (with_more("unet.a.lora_B.bias", torch.ones(2)), "holds unet.a.lora_B.bias, which are not a LoRA's"),
    "other tensors": (with_more("soft_tokens", torch.ones(2)), "holds soft_tokens, which"),
    "nothing": (lambda made: {}, "holds no tensors"),
    "two adapters": (
        lambda made: {f"unet.{MODULES[0]}.lora_A.{a}.weight": torch.ones(2, 2) for a in ("one", "two")},
        "the file holds several adapters",
    ),
    "a second bank of nobody's": (
        with_more("negative.unet.a.lora_A.weight", torch.ones(2, 2)),
        "not exported by agsm-rl",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_used_whole_is_refused(case, unet, tmp_path):
    make, message = REFUSED[case]
    save_file(make(weights(unet)), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / "x.safetensors", where="x")


def test_a_broken_header_is_one_message(tmp_path):
    file = tmp_path / "x.safetensors"
    deep = b'{"a":' * 100_000
    for content in (b"", b"\0" * 8, (2**62).to_bytes(8, "little"), len(deep).to_bytes(8, "little") + deep):
        file.write_bytes(content)
        with pytest.raises(UserError, match="truncated or not safetensors"):
            read_lora(file, where="x")


def test_a_layer_without_a_place_is_named_beside_the_names_that_would_fit(unet, tmp_path):
    made, file = weights(unet), tmp_path / "x.safetensors"
    for pattern in ("transformer.{module}.", "unet.down_blocks.9.{module}.", "text_encoder.{module}.", "x{module}."):
        stray = named({MODULES[0]: made[MODULES[0]]}, pattern, "lora_A.weight", "lora_B.weight")
        save_file(FORMS["diffusers"](made) | stray, file)
        with pytest.raises(UserError, match=r"no layer for 1 of the file's 5: .*called unet\.down_blocks"):
            read_lora(file, where="x").place({"unet": unet}, where="x")


def test_a_layer_of_another_width_or_given_twice_is_refused(unet, tmp_path):
    made, file = weights(unet), tmp_path / "x.safetensors"
    save_file(FORMS["diffusers"](made) | FORMS["kohya"](made), file)
    with pytest.raises(UserError, match=r"to_q appears twice, the second time as 'lora_unet_mid|'unet.mid"):
        read_lora(file, where="x").place({"unet": unet}, where="x")
    save_file(FORMS["diffusers"]({MODULES[0]: (torch.ones(2, 3), torch.ones(64, 2))}), file)
    with pytest.raises(UserError, match=r"\(2, 3\) and \(64, 2\), which do not fit this base's \(64, 64\)"):
        read_lora(file, where="x").place({"unet": unet}, where="x")


def test_convolutions_are_added_as_convolutions(unet, tmp_path):
    module = unet.mid_block.resnets[0].conv1
    down, up = torch.randn(RANK, 64, 3, 3), torch.randn(64, RANK, 1, 1)
    file = tmp_path / "x.safetensors"
    save_file(FORMS["kohya"]({"mid_block.resnets.0.conv1": (down, up)}), file)
    addition = read_lora(file, where="x").place({"unet": unet}, where="x")["unet"]["mid_block.resnets.0.conv1"]
    x = torch.randn(1, 64, 5, 5)
    wanted = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down, padding=1), up)
    got = torch.nn.functional.conv2d(x, addition.applied(torch.zeros_like(module.weight)), padding=1)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_name_that_two_text_encoders_share_belongs_to_neither(unet):
    names = LayerNames({"text_encoder": unet, "text_encoder_2": unet})
    assert names.find(f"base_model.model.{MODULES[0]}") is None
    assert names.find(f"text_encoder_2.{MODULES[0]}") == ("text_encoder_2", MODULES[0])
