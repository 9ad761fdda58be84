"""Qwen-Image: text in its template, latents by the VAE's statistics, soft tokens' places, and what it refuses."""

from pathlib import Path

import pytest
import torch
from tiny import save_kind, tiny

from agsm_rl.adapters.token_places import BlockCall, argument_positions
from agsm_rl.backbones.qwen_image import QwenImage, _append
from agsm_rl.errors import UserError

PROMPTS = ["a red circle", "two blue squares above a green triangle", "a red circle"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> QwenImage:
    folder: Path = save_kind("qwen_image", tmp_path_factory.mktemp("tiny-qwen-image"))
    return QwenImage(str(folder), device="cpu", resolution=16)


@torch.no_grad()
def test_a_prompt_is_read_in_the_template_whose_head_is_dropped(backbone: QwenImage) -> None:
    cond, (embeds, mask) = backbone.encode_text(PROMPTS), backbone.pipeline.encode_prompt(PROMPTS)
    torch.testing.assert_close(cond.embeds, embeds, rtol=1e-4, atol=1e-5)
    assert torch.equal(cond.mask, mask.bool())
    assert backbone.encode_text(PROMPTS[:1]).mask is None
    short, long = backbone.read_tokens(["a red circle", "circle " * 600])
    assert backbone.pipeline.tokenizer.decode(short.ids) == "a red circle<|im_end|>\n<|im_start|>assistant\n"
    assert len(short.ids) == int(cond.mask[0].sum()) and not short.is_cut
    assert len(long.ids) == 512 and long.is_cut and backbone.encode_text(["circle " * 600]).embeds.shape[1] == 512


@torch.no_grad()
def test_latents_are_normalised_channel_by_channel(backbone: QwenImage) -> None:
    images, vae = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), backbone.pipeline.vae
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    plain = vae.encode(2 * images[:, :, None] - 1).latent_dist.mode()[:, :, 0]
    torch.testing.assert_close(backbone.encode_images(images), (plain - mean) / std)


def test_soft_tokens_are_seen_and_share_the_first_token_s_position(backbone: QwenImage) -> None:
    transformer = backbone.denoiser
    block, rotary = transformer.transformer_blocks[0], transformer.pos_embed((1, 4, 4), max_txt_seq_len=3)
    text, mask = torch.zeros(1, 3, 32), torch.tensor([[True, True, False]])
    call = BlockCall([torch.zeros(1, 16, 32), text, mask, None, rotary], {}, argument_positions(block))
    _append(call, torch.ones(1, 2, 32))
    assert call.get("encoder_hidden_states_mask").tolist() == [[True, True, False, True, True]]
    assert call.get("encoder_hidden_states")[0, :, 0].tolist() == [0, 0, 0, 1, 1]
    image, positions = call.get("image_rotary_emb")
    assert torch.equal(image, rotary[0]) and torch.equal(positions[:3], rotary[1])
    assert torch.equal(positions[3:], rotary[1][:1].expand(2, -1))


def test_guidance_needs_a_negative_prompt_for_each_picture(backbone: QwenImage) -> None:
    assert backbone.guidance_arguments(4.0, None, 2) == {"true_cfg_scale": 4.0, "negative_prompt": ["", ""]}
    assert backbone.guidance_arguments(1.0, None, 2) == {"true_cfg_scale": 1.0}


def test_a_transformer_with_guidance_as_an_input_is_refused() -> None:
    pipeline = tiny("qwen_image").make()
    pipeline.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(UserError, match="its transformer has guidance_embeds"):
        QwenImage.from_pipeline(pipeline, resolution=16)
