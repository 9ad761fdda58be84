"""FlowEdit is the authors' loop, and changes nothing where there is nothing to change."""

import pytest
import torch

from agsm_rl.editing.editor import EditSettings, edit_latents
from agsm_rl.editing.flow_edit import flow_edit
from agsm_rl.errors import UserError
from agsm_rl.training.randomness import stream

SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def random(seed, shape=(1, 4, 8, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fresh(k, n):
    return random(100 + 10 * k + n)


def same_noise(seed, k, n, shape):
    """The noise that an edit draws."""
    generator = torch.Generator().manual_seed(int(stream(seed, "flowedit", k, n).integers(2**63)))
    return torch.randn(shape, generator=generator)[None]


@torch.no_grad()
def released_loop(pipe, x_src, prompts, scales, steps, n_min, n_max, n_avg, seed):
    """The authors' FlowEditSD3 (fallenshock/FlowEdit, FlowEdit_utils.py), written down anew, with our noise."""
    pipe.scheduler.set_timesteps(steps)
    timesteps = pipe.scheduler.timesteps
    encoded = []
    for prompt in prompts:
        embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
            prompt=prompt, prompt_2=None, prompt_3=None, negative_prompt="", do_classifier_free_guidance=True
        )
        encoded += [(negative, negative_pooled), (embeds, pooled)]
    embeds, pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))

    def velocities(source, edited, t):
        rows = torch.cat([source, source, edited, edited])
        found = pipe.transformer(
            hidden_states=rows, timestep=t.expand(4), encoder_hidden_states=embeds, pooled_projections=pooled
        ).sample
        source_uncond, source_text, target_uncond, target_text = found.chunk(4)
        return (
            source_uncond + scales[0] * (source_text - source_uncond),
            target_uncond + scales[1] * (target_text - target_uncond),
        )

    edited = x_src.clone()
    for i, t in enumerate(timesteps):
        if steps - i > n_max:
            continue
        t_i = t / 1000
        t_next = timesteps[i + 1] / 1000 if i + 1 < steps else torch.zeros_like(t_i)
        if steps - i > n_min:
            average = torch.zeros_like(x_src)
            for n in range(n_avg):
                noise = same_noise(seed, i, n, x_src.shape[1:])
                hidden = (1 - t_i) * x_src + t_i * noise
                of_source, of_target = velocities(hidden, edited + hidden - x_src, t)
                average += (of_target - of_source) / n_avg
            edited = edited + (t_next - t_i) * average
            continue
        if i == steps - n_min:
            noise = same_noise(seed, i, 0, x_src.shape[1:])
            drawn = edited + (t_i * noise + (1 - t_i) * x_src) - x_src
        drawn = drawn + (t_next - t_i) * velocities(drawn, drawn, t)[1]
    return edited if n_min == 0 else drawn


@pytest.mark.parametrize(("n_min", "n_avg"), [(0, 1), (2, 2)])
def test_it_is_the_authors_loop(sd3_backbone, n_min, n_avg):
    latents, prompts = random(1, (1, *sd3_backbone.latent_shape)), ("a red star", "two blue circles")
    settings = EditSettings(num_steps=5, strength=0.8, n_min=n_min, n_avg=n_avg)
    found = edit_latents(sd3_backbone, latents, prompts[:1], prompts[1:], seeds=[7], settings=settings)
    expected = released_loop(sd3_backbone.pipeline, latents, prompts, (3.5, 13.5), 5, n_min, 4, n_avg, 7)
    assert (found - latents).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_equal_prompts_and_guidances_give_the_source_back_exactly(sd3_backbone):
    latents, prompt = random(1, (2, *sd3_backbone.latent_shape)), ["a red star", "two blue circles"]
    settings = EditSettings(num_steps=3, guidance=5.0, source_guidance=5.0, strength=1.0, n_avg=2)
    found = edit_latents(sd3_backbone, latents, prompt, prompt, seeds=[0, 1], settings=settings)
    assert torch.equal(found, latents)


def test_only_the_last_n_max_steps_are_taken():
    seen = []

    def predict(x, sigma):
        seen.append(float(sigma))
        return x

    flow_edit(predict, predict, random(0), SIGMAS, fresh, n_max=2)
    assert seen == [0.5, 0.5, 0.25, 0.25]


def test_where_all_steps_draw_in_the_ordinary_way_the_source_prompt_has_no_part():
    """SDEdit: noise the source, then draw."""

    def never(x, sigma):
        raise AssertionError("the source prompt was asked")

    x = 0.5 * random(0) + 0.5 * fresh(2, 0)
    for k in (2, 3):
        x = x + (SIGMAS[k + 1] - SIGMAS[k]) * x.tanh()
    found = flow_edit(never, lambda x, sigma: x.tanh(), random(0), SIGMAS, fresh, n_max=2, n_min=2)
    torch.testing.assert_close(found, x)


def test_the_edit_moves_by_the_mean_over_the_noises():
    found = flow_edit(lambda x, s: x * 0, lambda x, s: x, random(0), SIGMAS, fresh, n_max=1, n_avg=2)
    hidden = 0.75 * random(0) + 0.25 * (fresh(3, 0) + fresh(3, 1)) / 2
    torch.testing.assert_close(found, random(0) - 0.25 * hidden)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"n_max": 5}, "n_max: got 5; of 4 steps"),
        ({"n_max": 0}, "n_max: got 0"),
        ({"n_max": 2, "n_min": 3}, "n_min: got 3; 0 to n_max, which is 2"),
        ({"n_max": 2, "n_avg": 0}, "n_avg: got 0"),
    ],
)
def test_steps_that_do_not_exist_are_refused(numbers, words):
    with pytest.raises(UserError, match=words):
        flow_edit(lambda x, s: x, lambda x, s: x, random(0), SIGMAS, fresh, **numbers)
