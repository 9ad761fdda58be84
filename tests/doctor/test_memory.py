"""The predicted memory is what a real step takes from the allocator, and what is proposed to fit does."""

import pytest
import torch
from measure import allocator_peak
from tiny import KINDS, options_of, save_kind

from agsm_rl.backbones.quantized_layers import stored_tensors
from agsm_rl.backbones.text_memory import TextMemory
from agsm_rl.doctor.memory import fit as fitting
from agsm_rl.doctor.memory.fit import MARGIN, changed, fit
from agsm_rl.doctor.memory.meta_device import Rehearsal
from agsm_rl.doctor.memory.predict import Prediction, predict, steps_to_see
from agsm_rl.doctor.memory.waiting import bytes_of
from agsm_rl.export.attach import save_adapters
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.trainer import Term

PAIRS = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 8, "num_images": 8}
ROLLOUTS = {
    "use": "rollouts",
    "prompts": "builtin:shapes-prompts",
    "rewards": {"brightness": 1.0},
    "num_prompts": 2,
    "images_per_prompt": 4,
    "num_steps": 4,
    "guidance": 3.0,
}


@pytest.fixture
def make_recipe(tiny_checkpoint):
    """A recipe of one objective on the tiny base, wide enough for activations to count."""

    def make(use, source, *, checkpoint=None, adapters=None, backbone=None, start_from=None, **options):
        data = {
            "steps": 2,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(checkpoint or tiny_checkpoint), "device": "cpu"},
            "adapters": adapters or {"lora": {"use": "lora", "rank": 2, "banks": 2}, "tokens": {"use": "soft_tokens"}},
            "objectives": [{"use": use, "source": source, **options}],
            "start_from": start_from and str(start_from),
            "track": [],
        }
        data["backbone"] |= backbone or {}
        return Recipe.from_data(data)

    return make


def test_a_run_in_which_no_term_is_due_needs_what_lies_there(make_recipe):
    _, found = predict(make_recipe("agsm", PAIRS, weight=0))
    assert found.peak == sum(found.resident.values()) > 0
    assert found.phase == "steps in which no term is due"


def test_a_run_on_samples_of_the_vae_s_posterior_is_predicted(make_recipe):
    assert_close(make_recipe("agsm", PAIRS | {"latents": "sample"}))


def measured(recipe):
    """Bytes at the peak of a step: what lies there, and what the CPU's allocator was asked for in torch's profile."""
    trainer = build_trainer(recipe)
    trainer.run_step()
    trainer._texts = [TextMemory(trainer.policy.backbone)]  # a step whose prompts are new
    kept = {id(tensor.untyped_storage()): tensor for tensor in _kept(trainer)}
    return allocator_peak(trainer.run_step) + sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def _kept(trainer):
    modules = [
        part for part in trainer.policy.backbone.pipeline.components.values() if isinstance(part, torch.nn.Module)
    ]
    own = {id(parameter) for parameter in trainer.parameters.values()}
    frozen = [entry for part in modules for entry in (*part.named_parameters(), *part.named_buffers())]
    for name, tensor in frozen:
        if id(tensor) not in own:
            yield from (stored for _, stored in stored_tensors(name, tensor))
    for part in modules:  # tables of rotary positions, which are no buffers
        yield from (held for module in part.modules() for held in vars(module).values() if torch.is_tensor(held))
    for parameter in trainer.parameters.values():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
        yield from (value for value in trainer.optimizer.state[parameter].values() if value.dim())
    yield from trainer.policy.state_dict()["ema"].values()


def assert_close(recipe, within=0.15):
    predicted, real = predict(recipe)[1].peak, measured(recipe)
    assert predicted == pytest.approx(real, rel=within), f"predicted {predicted}, measured {real}"
    return predicted


def test_a_frozen_adapter_has_neither_gradients_nor_an_optimisers_state(make_recipe, tmp_path):
    lora = {"lora": {"use": "lora", "rank": 2, "banks": 2}}
    first = build_trainer(make_recipe("agsm", PAIRS, adapters=lora))
    save_adapters(first.policy.adapters, tmp_path, metadata={})
    adapters = lora | {"tokens": {"use": "soft_tokens"}}
    recipe = make_recipe("agsm", PAIRS, adapters=adapters, start_from=tmp_path, trains=["tokens"])
    assert_close(recipe)
    rows = predict(recipe)[1].resident
    assert 2 * rows["gradients"] == rows["AdamW"] and rows["gradients"] < rows["adapters"] == rows["EMA"]


@pytest.mark.parametrize("use", ["prodigy", "muon", "adafactor", "adamw_8bit"])
def test_each_optimizers_run_is_predicted_with_its_state(make_recipe, use):
    if use in ("prodigy", "adamw_8bit"):
        pytest.importorskip("prodigyopt" if use == "prodigy" else "bitsandbytes")
    data = make_recipe("score_matching", PAIRS).to_data() | {"optimizer": {"use": use}}
    trainer, found = predict(Recipe.from_data(data))
    assert isinstance(found, Prediction), found
    name = type(trainer.optimizer_kind).__name__
    assert found.resident[name] == trainer.optimizer_kind.state_bytes(list(trainer.parameters.values())) > 0
    assert found.peak > sum(found.resident.values())


@pytest.mark.parametrize("use", ["agsm", "softrepa"])
def test_the_peak_of_contrast_is_predicted_for_any_number_of_groups_a_pass(make_recipe, use):
    passes = [{}, {"groups_per_pass": 1}, {"images_per_pass": 1}]
    peaks = [assert_close(make_recipe(use, PAIRS, group_size=2, **options)) for options in passes]
    assert peaks[0] > 1.5 * peaks[1] and peaks[1] > peaks[2]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_ddpo_is_predicted_for_any_number_of_images_a_pass(make_recipe, checkpointing):
    backbone, rollouts = {"gradient_checkpointing": checkpointing}, ROLLOUTS | {"sample_batch_size": 4, "num_steps": 2}
    for count in (None, 1):
        assert_close(make_recipe("ddpo", rollouts, backbone=backbone, images_per_pass=count))


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_the_peak_is_predicted_on_each_kind_of_base(make_recipe, request, kind):
    checkpoint = request.getfixturevalue({"sdxl": "tiny_xl_checkpoint", "sd3": "tiny_sd3_checkpoint"}[kind])
    adapters = {"lora": {"use": "lora", "rank": 2}}
    assert_close(make_recipe("diffusion_nft", ROLLOUTS, checkpoint=checkpoint, adapters=adapters))


@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_is_predicted_on_the_newer_kinds_within_5_percent(make_recipe, tmp_path, kind):
    adapters = {"lora": {"use": "lora", "rank": 2}, "tokens": {"use": "soft_tokens"}}
    backbone = {"use": "auto", **options_of(kind)}
    assert_close(
        make_recipe("agsm", PAIRS, checkpoint=save_kind(kind, tmp_path), adapters=adapters, backbone=backbone),
        within=0.05,
    )


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_peak_on_a_base_in_few_bits_is_predicted_within_5_percent(make_recipe, tiny_sd3_checkpoint, kind):
    pytest.importorskip("torchao")
    backbone = {"use": "auto", "quantize": kind, "gradient_checkpointing": kind == "fp8", "t5_length": 20}
    adapters = {"lora": {"use": "lora", "rank": 2}}
    recipe = make_recipe("agsm", PAIRS, checkpoint=tiny_sd3_checkpoint, adapters=adapters, backbone=backbone)
    assert_close(recipe, within=0.05)


def test_parts_that_wait_on_the_cpu_are_counted_only_while_they_work(make_recipe, tiny_sd3_checkpoint):
    def predicted(**options):
        backbone = {"use": "auto", "t5_length": 20} | options
        return predict(make_recipe("score_matching", PAIRS, checkpoint=tiny_sd3_checkpoint, backbone=backbone))

    trainer, loaded = predicted()
    parts = trainer.policy.backbone.pipeline.components
    sizes = {name: bytes_of(part) for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    texts = sum(size for name, size in sizes.items() if name.startswith("text_encoder"))
    for options, waiting in (({"text": {"keep": "cache"}}, texts), ({"cpu_offload": "model"}, texts + sizes["vae"])):
        _, found = predicted(**options)
        learning = "learning score_matching"
        assert loaded.peaks[learning] - found.peaks[learning] == waiting
        assert loaded.resident["frozen weights"] - found.resident["frozen weights"] == waiting
        assert found.peaks["encoding texts"] > sum(found.resident.values()) + texts


def test_caches_and_few_bits_are_proposed_where_nothing_gentler_suffices(make_recipe, tiny_sd3_checkpoint):
    backbone = {"use": "auto", "t5_length": 20, "dtype": "bfloat16", "gradient_checkpointing": True}
    pairs = PAIRS | {"batch_size": 2}
    recipe = make_recipe("score_matching", pairs, checkpoint=tiny_sd3_checkpoint, backbone=backbone, rows_per_pass=1)
    now = predict(recipe)[1]
    least = fit(recipe, now, 1000)
    assert not least.fits and least.changes["backbone.text"] == {"keep": "cache"}
    found = fit(recipe, now, least.prediction.peak * (1 + MARGIN) + 1)
    assert found.fits and found.changes["backbone.quantize"] == "nf4"
    assert predict(changed(recipe, found.changes))[1].peak == found.prediction.peak < now.peak


@pytest.mark.parametrize(
    "adapter",
    [{"use": "lora", "rank": 4, "use_dora": True}, {"use": "oft", "oft_block_size": 8}],
    ids=["dora", "oft"],
)
def test_the_peak_is_predicted_for_adapters_that_do_more_than_add(make_recipe, adapter):
    assert_close(make_recipe("score_matching", PAIRS, adapters={"x": adapter}), within=0.05)


def test_rewards_are_not_asked_and_weights_are_not_read(make_recipe, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("called")

    monkeypatch.setattr("agsm_rl_rewards.brightness.Brightness.__call__", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    trainer, prediction = predict(make_recipe("ddpo", ROLLOUTS))
    assert prediction.peak > sum(prediction.resident.values()) > 0
    assert all(parameter.is_meta for parameter in trainer.policy.backbone.denoiser.parameters())


def test_what_cannot_be_rehearsed_is_told_and_not_guessed(make_recipe, monkeypatch):
    def odd(*_, **__):
        raise NotImplementedError("no meta kernel")

    monkeypatch.setattr("agsm_rl.objectives.ddpo.DDPO.loss", odd)
    assert predict(make_recipe("ddpo", ROLLOUTS))[1] == "NotImplementedError: no meta kernel"


def test_the_proposal_fits_and_halves_passes_before_it_changes_the_base(make_recipe):
    recipe = make_recipe("agsm", PAIRS, group_size=2)
    own = predict(recipe)[1]
    assert fit(recipe, own, own.peak * 2).changes == {}
    smaller = fit(recipe, own, own.peak)  # which leaves nothing to spare
    assert smaller.fits and set(smaller.changes) == {"objectives.0.images_per_pass"}
    again = predict(changed(recipe, smaller.changes))[1]
    assert again.peak == smaller.prediction.peak <= own.peak / (1 + MARGIN)


def test_several_steps_a_pass_are_predicted_and_taken_back_where_they_do_not_fit(make_recipe):
    recipe = make_recipe("ddpo", ROLLOUTS | {"sample_batch_size": 4}, images_per_pass=4, steps_per_pass=4)
    assert_close(recipe)
    own = predict(recipe)[1]
    found = fit(recipe, own, own.peak)
    assert found.fits and found.changes["objectives.0.steps_per_pass"] == 2


def test_what_is_1_already_is_no_proposal(make_recipe, monkeypatch):
    monkeypatch.setattr(fitting, "STEPS", ())
    recipe = make_recipe("ddpo", ROLLOUTS | {"sample_batch_size": 4})
    own = predict(recipe)[1]
    assert "objectives.0.steps_per_pass" not in fit(recipe, own, 1000).changes


def test_checkpointing_is_not_proposed_beside_compile(make_recipe, monkeypatch):
    monkeypatch.setattr(fitting, "STEPS", fitting.STEPS[:1])
    recipe = make_recipe("agsm", PAIRS, group_size=2, backbone={"compile": "default"})
    assert "backbone.gradient_checkpointing" not in fit(recipe, predict(recipe)[1], 1000).changes


def test_a_kept_graph_is_predicted_and_given_up_before_the_base_is_changed(make_recipe):
    recipe = make_recipe("ddpo", ROLLOUTS | {"keep_graph": True, "sample_batch_size": 4, "num_steps": 2})
    assert_close(recipe)
    own = predict(recipe)[1]
    found = fit(recipe, own, own.peak)
    assert found.fits and found.changes == {"objectives.0.source.keep_graph": False}


def test_of_a_flow_s_kept_graph_the_step_without_noise_is_no_part(make_recipe, tiny_sd3_checkpoint):
    source = ROLLOUTS | {"keep_graph": True, "num_steps": 2, "guidance": 1.0}
    recipe = make_recipe("ddpo", source, checkpoint=tiny_sd3_checkpoint, backbone={"t5_length": 20})
    assert_close(recipe)


def test_what_fits_nowhere_is_told_with_the_least_that_was_found(make_recipe, monkeypatch):
    some = [step for step in fitting.STEPS if step[0] in ("gradient_checkpointing", "dtype")]
    monkeypatch.setattr(fitting, "STEPS", tuple(some))
    recipe = make_recipe("score_matching", PAIRS)
    own = predict(recipe)[1]
    found = fit(recipe, own, 1000)
    assert not found.fits and found.prediction.peak < own.peak
    assert found.changes["backbone.gradient_checkpointing"] and found.changes["backbone.dtype"] == "bfloat16"


def test_every_set_of_terms_that_come_together_is_rehearsed_once(make_pairs):
    from agsm_rl.objectives.agsm import AGSM

    def term(name, **when):
        return Term(AGSM(), make_pairs(), name=name, **when)

    assert steps_to_see([term("a"), term("b", every=3)], 100) == [0]
    assert steps_to_see([term("a", every=2), term("b", every=2, offset=1)], 100) == [0, 1]
    assert steps_to_see([term("a"), term("b", weight={0: 0.0, 50: 0.0, 60: 1.0})], 100) == [51]


def test_memory_is_counted_once_a_storage_and_given_back():
    with Rehearsal() as rehearsal:
        tensor = torch.empty(10, 100, device="meta")
        row = tensor[0]
        assert rehearsal.now == 4000
        del tensor
        assert rehearsal.now == 4000
        del row
        assert rehearsal.now == 0
        assert rehearsal.peaks == {"": 4000}


def test_known_integers_keep_their_values_beside_tensors_without_any():
    with Rehearsal():
        values = torch.empty(4, 3, device="meta")
        rows = torch.arange(4, device="meta")
        assert values[rows[rows > 1]].shape == (2, 3)
        assert values.cpu().tolist() == [[0.0] * 3] * 4
