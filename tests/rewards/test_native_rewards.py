"""The native rewards with tiny weights in their official layout, against networks written out by hand."""

import explicit
import golden_formula
import numpy as np
import pytest
import tiny_rewards
import torch
from agsm_rl_rewards.preprocessing import MEAN, STD, Letterbox, ShortestSideCrop
from PIL import Image
from tiny_rewards import HEADS, TEXT_HEADS, TINY
from tokenizers import Tokenizer
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Reward
from agsm_rl.training.defaults import with_defaults

PROMPTS = ["a red star", "two blue squares", "a circle"]
PICTURES = [golden_formula.picture(48, 30), golden_formula.picture(41, 67), golden_formula.picture(32, 32)]
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def photos(count=3, height=30, width=48):
    """Smooth images, as photographs are, [B, 3, H, W] in [0, 1]."""
    noise = torch.rand(count, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bilinear", align_corners=True)


def token_ids(folder, texts, length):
    """Filled with zeros."""
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    ids = [tokenizer.encode(text).ids for text in texts]
    return torch.tensor([row + [0] * (length - len(row)) for row in ids])


def processed(size):
    """The pictures as transformers' own processor makes them."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return torch.cat([processor(picture, return_tensors="pt")["pixel_values"] for picture in PICTURES])


def test_hpsv2_is_open_clips_cosine_of_the_letterboxed_picture(make_reward, tiny_options):
    weights = torch.load(f"{tiny_options['hpsv2']['path']}/HPS_v2.1_compressed.pt")["state_dict"]
    ids = token_ids(tiny_options["hpsv2"]["tokenizer"], PROMPTS, 12)
    expected = explicit.hpsv2(weights, Letterbox(28).exact(PICTURES), ids, heads=HEADS)
    found = make_reward("hpsv2").score_pictures(PICTURES, PROMPTS)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert found.std() > 0.01


def test_the_other_version_s_official_file_is_refused(tiny_options, make_reward):
    file = f"{tiny_options['hpsv2']['path']}/HPS_v2.1_compressed.pt"
    assert make_reward("hpsv2", path=file, version="2.1").version == "2.1"
    with pytest.raises(UserError, match='HPS_v2.1_compressed.pt is version 2.1, not the version "2.0"'):
        make_reward("hpsv2", path=file, version="2.0")


def test_image_reward_is_the_head_of_the_text_that_sees_the_image(make_reward, tiny_options):
    weights = torch.load(f"{tiny_options['image_reward']['path']}/ImageReward.pt")
    ids = token_ids(tiny_options["image_reward"]["tokenizer"], PROMPTS, 35)
    pixels = ShortestSideCrop(32, processor=False).exact(PICTURES)
    expected = explicit.image_reward(weights, pixels, ids, (ids > 0).int(), heads=HEADS, text_heads=TEXT_HEADS)
    found = make_reward("image_reward").score_pictures(PICTURES, PROMPTS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.std() > 0.01


def test_pick_score_is_clips_logit(make_reward, tiny_options):
    folder = tiny_options["pick_score"]["path"]
    ids = token_ids(folder, PROMPTS, 12)
    with torch.no_grad():
        found = CLIPModel.from_pretrained(folder).eval()(input_ids=ids, pixel_values=processed(28))
    scores = make_reward("pick_score").score_pictures(PICTURES, PROMPTS)
    torch.testing.assert_close(scores, found.logits_per_image.diagonal(), rtol=1e-5, atol=1e-5)


def test_pick_score_is_divided_by_26_as_flow_grpo_does(make_reward):
    plain, divided = make_reward("pick_score"), make_reward("pick_score", divisor=26)
    torch.testing.assert_close(
        26 * divided.score_pictures(PICTURES, PROMPTS), plain.score_pictures(PICTURES, PROMPTS), rtol=1e-6, atol=1e-6
    )
    assert divided.range == (-100 / 26, 100 / 26) and plain.range == (-100.0, 100.0)
    with pytest.raises(UserError, match="divisor: got 0, but it must be above 0"):
        make_reward("pick_score", divisor=0)


def test_clip_score_is_the_scaled_cosine_and_never_negative(make_reward, tiny_options):
    folder = tiny_options["clip_score"]["path"]
    ids = token_ids(folder, [f"two {prompt}" for prompt in PROMPTS], 12)
    with torch.no_grad():
        found = CLIPModel.from_pretrained(folder).eval()(input_ids=ids, pixel_values=processed(28))
    cosine = (found.image_embeds @ found.text_embeds.T).diagonal()
    reward = make_reward("clip_score", scale=2.5, prefix="two ")
    torch.testing.assert_close(
        reward.score_pictures(PICTURES, PROMPTS), 2.5 * cosine.clamp(min=0), rtol=1e-5, atol=1e-5
    )
    assert reward.range == (0.0, 2.5)
    assert (cosine > 0).all()
    scores, logits = make_reward("clip_score")(photos(), PROMPTS), make_reward("pick_score")(photos(), PROMPTS)
    assert torch.equal(scores > 0, logits > 0) and scores.min() == 0 < scores.max()


def test_the_aesthetic_score_is_the_linear_head_of_the_unit_image_feature(make_reward, tiny_options):
    clip = CLIPModel.from_pretrained(tiny_options["aesthetic"]["clip"]).eval()
    pixels = ShortestSideCrop(28, processor=False).exact(PICTURES)
    with torch.no_grad():
        features = clip.get_image_features(pixel_values=pixels).pooler_output
    weights = torch.load(tiny_options["aesthetic"]["path"])
    expected = explicit.head(weights, features / features.norm(dim=-1, keepdim=True), "layers.")
    torch.testing.assert_close(
        make_reward("aesthetic").score_pictures(PICTURES, PROMPTS), expected, rtol=1e-5, atol=1e-4
    )


def test_each_follows_the_interface(each_reward):
    assert isinstance(with_defaults(each_reward, Reward), Reward) and each_reward.licence
    low, high = each_reward.range
    scores = each_reward(photos(), PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and not scores.requires_grad
    assert ((low <= scores) & (scores <= high)).all()


def test_tensors_are_scored_as_the_pictures_that_they_are(each_reward):
    images = photos()
    files = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    torch.testing.assert_close(each_reward(images, PROMPTS), each_reward.score_pictures(files, PROMPTS))


def test_the_way_with_gradients_scores_nearly_as_the_exact_one(each_reward, make_reward):
    images = photos()
    exact, near = each_reward(images, PROMPTS), each_reward(images.requires_grad_(), PROMPTS)
    # 8 bits against floating point, on random networks that are rougher than trained ones: far less than what tells
    # the images apart.
    assert (near.detach() - exact).abs().max() < 0.1 * exact.std()
    chosen = make_reward(each_reward.name, preprocessing="tensor")
    torch.testing.assert_close(chosen(images.detach(), PROMPTS), near.detach(), rtol=0, atol=1e-6)


def test_gradients_reach_the_pixels_and_are_those_of_small_steps(each_reward):
    images = photos(2, 40, 28).requires_grad_()
    (gradient,) = torch.autograd.grad(each_reward(images, PROMPTS[:2]).sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    along = gradient / gradient.norm()
    way = 0.02
    ahead, behind = ((each_reward(images + sign * way * along, PROMPTS[:2])).sum().item() for sign in (1, -1))
    assert (ahead - behind) / (2 * way) == pytest.approx(gradient.norm().item(), rel=0.05)


def test_weights_get_no_gradients(each_reward):
    each_reward(photos(1).requires_grad_(), PROMPTS[:1]).sum().backward()
    assert all(parameter.grad is None for parameter in each_reward.network.parameters())


def test_exact_preprocessing_has_no_gradient_and_says_so(each_reward, make_reward):
    exact = make_reward(each_reward.name, preprocessing="exact")
    assert each_reward.differentiable and not exact.differentiable
    torch.testing.assert_close(exact(photos(), PROMPTS), each_reward(photos(), PROMPTS))
    with pytest.raises(UserError, match=f"reward '{exact.name}': `preprocessing: exact` .* no gradient"):
        exact(photos().requires_grad_(), PROMPTS)


def test_many_images_score_as_one_by_one(each_reward):
    images, prompts = photos(35), [PROMPTS[index % 3] for index in range(35)]
    single = torch.cat([each_reward(images[i : i + 1], [prompts[i]]) for i in (0, 7, 34)])
    torch.testing.assert_close(each_reward(images, prompts)[[0, 7, 34]], single, rtol=1e-4, atol=1e-4)


def test_images_and_prompts_must_be_as_many(each_reward):
    with pytest.raises(ValueError, match="3 images, but 2 prompts"):
        each_reward(photos(), PROMPTS[:2])


def test_two_rewards_of_the_same_weights_share_one_network(make_reward):
    one, same = make_reward("hpsv2"), make_reward("hpsv2", preprocessing="exact")
    for reward in (one, same):
        reward.prepare("cpu")
    assert one.network is same.network


def test_a_picture_with_alpha_or_in_grey_is_scored_as_rgb(each_reward):
    pixels = np.full((32, 32), 90, np.uint8)
    grey = Image.fromarray(pixels)
    opaque = Image.fromarray(np.stack([pixels, pixels, pixels, np.full_like(pixels, 255)], axis=-1), "RGBA")
    scores = each_reward.score_pictures([grey, opaque, grey.convert("RGB")], ["a star"] * 3)
    torch.testing.assert_close(scores, scores[[2, 2, 2]])


def test_hpsv2_mends_and_unescapes_prompts_before_reading_them(make_reward):
    reward = make_reward("hpsv2")
    said = [" two red stars ", "two red stars", "two &amp;lt; stars", "two < stars", "schÃ¶n", "schön"]
    scores = reward(photos(1).expand(6, -1, -1, -1), said)
    assert scores[0] == scores[1] and scores[2] == scores[3] and scores[4] == scores[5]
    assert len(set(scores.tolist())) == 3


def test_long_prompts_are_cut(each_reward):
    """At 12 tokens here for the CLIPs, and at 35 for ImageReward, whose tiny text has 36 places."""
    ends = ["red", "blue"]
    scores = each_reward(photos(1).expand(2, -1, -1, -1), [f"{'star ' * 40}{end}" for end in ends])
    # The same tokens; two rows of a batch may be summed in another order.
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)


def test_versions_are_named_and_have_files_of_their_own(tmp_path):
    options = tiny_rewards.save_hpsv2(tmp_path, "2.0")
    hpsv2 = TINY["hpsv2"][0]
    assert hpsv2(**options)(photos(), PROMPTS).shape == (3,)
    with pytest.raises(UserError, match=r"no HPS_v2\.1_compressed\.pt in the folder"):
        hpsv2(**(options | {"version": "2.1"}))
    with pytest.raises(UserError, match=r"version: '2' is not a version of HPSv2"):
        hpsv2(**(options | {"version": "2"}))
    with pytest.raises(TypeError, match="version"):
        hpsv2()


@pytest.mark.parametrize("name", ["hpsv2", "image_reward"])
def test_an_unknown_size_is_named(make_reward, name):
    with pytest.raises(UserError, match=r"architecture.vision: 'hiden_size' .* Did you mean 'hidden_size'"):
        make_reward(name, architecture={"vision": {"hiden_size": 8}})
    with pytest.raises(UserError, match=r"architecture: 'visoin' is not a part"):
        make_reward(name, architecture={"visoin": {}})
    with pytest.raises(UserError, match=r"architecture.text.num_hidden_layers: got 0"):
        make_reward(name, architecture={"text": {"num_hidden_layers": 0}})


def test_an_unknown_way_is_named(each_reward, make_reward):
    with pytest.raises(UserError, match="preprocessing: 'exakt' .* Did you mean 'exact'"):
        make_reward(each_reward.name, preprocessing="exakt")


@pytest.mark.parametrize(("width", "height"), [(300, 200), (251, 333), (225, 300), (224, 226), (64, 64)])
def test_the_processors_crop_is_that_of_transformers(width, height):
    picture = golden_formula.picture(width, height)
    expected = CLIPImageProcessorPil()(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ShortestSideCrop(224, processor=True).exact([picture]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [Letterbox, lambda size: ShortestSideCrop(size, processor=False)])
@pytest.mark.parametrize(("height", "width"), [(100, 75), (64, 201), (28, 28), (20, 31)])
def test_both_ways_see_nearly_the_same(make, height, width):
    images = photos(1, height, width)
    files = [Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy())]
    exact, near = make(28).exact(files), make(28).tensor(images)
    assert exact.shape == near.shape == (1, 3, 28, 28)
    # Two levels of 255, in units of CLIP's standard deviation: rounding of the pixels, and PIL's between its passes.
    assert (exact - near).abs().max() < 2 / 255 / min(STD)


def test_a_letterbox_is_black_beside_the_picture():
    found = Letterbox(28).tensor(torch.ones(1, 3, 20, 40))
    black, white = (torch.tensor([(value - m) / s for m, s in zip(MEAN, STD, strict=True)]) for value in (0, 1))
    torch.testing.assert_close(found[0, :, :7].amax(dim=(1, 2)), black)
    torch.testing.assert_close(found[0, :, 7:21].mean(dim=(1, 2)), white)
    torch.testing.assert_close(found[0, :, 21:].amin(dim=(1, 2)), black)
