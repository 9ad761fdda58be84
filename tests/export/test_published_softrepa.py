"""SoftREPA's SD1.5 tokens, once converted, predict as in the authors' code, which is written out here anew.

Files as published: `dc_tokens.pth` (4, 768) and `dc_t_tokens.pth`, a pickled nn.Embedding(100, 768); run_eval.sh has
`APPLYDC="True False False"` for SD1.5: the down blocks see the tokens, the mid and up blocks the plain prompt.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_pipelines import clip_config, tiny_unet, tiny_vae
from torch import Tensor, nn
from transformers import CLIPTextModel

from agsm_rl.export.attach import attach
from agsm_rl.export.convert import convert
from agsm_rl.shapes.train_base.layouts import assemble_sd15
from agsm_rl.shapes.train_base.text import make_tokenizer

WIDTH = 768
TIMESTEPS = torch.tensor([0, 9, 10, 437, 999])


def as_the_authors(unet: Any, x: Tensor, t: Tensor, text: Tensor, tokens: Tensor, times: Tensor) -> Tensor:
    """The prediction with tokens between BOS and the rest of the prompt, for the down blocks alone."""
    rows = tokens[None] + times[t // 10][:, None]
    longer = torch.cat([text[:, :1], rows, text[:, 1:]], dim=1)
    emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t))
    h = unet.conv_in(x)
    skips = (h,)
    for block in unet.down_blocks:
        h, new = block(hidden_states=h, temb=emb, encoder_hidden_states=longer)
        skips += new
    h = unet.mid_block(h, emb, encoder_hidden_states=text)
    for block in unet.up_blocks:
        count = len(block.resnets)
        h = block(hidden_states=h, temb=emb, res_hidden_states_tuple=skips[-count:], encoder_hidden_states=text)
        skips = skips[:-count]
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """A pipeline as wide as SD1.5 in its text, but with few channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        encoder, unet = CLIPTextModel(clip_config(tokenizer, WIDTH)), tiny_unet(WIDTH)
        return assemble_sd15(tiny_vae(), encoder, tokenizer=tokenizer, unet=unet)


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Tensor, Tensor]:
    """A folder with the two files, and what they hold; the sizes of the values are those of the published ones."""
    generator = torch.Generator().manual_seed(1)
    tokens, times = torch.randn(4, WIDTH, generator=generator), torch.randn(100, WIDTH, generator=generator)
    torch.save(nn.Parameter(tokens), tmp_path / "dc_tokens.pth")
    table = nn.Embedding(100, WIDTH)
    table.weight.data.copy_(times)
    torch.save(table, tmp_path / "dc_t_tokens.pth")
    return tmp_path, tokens, times


@torch.no_grad()
def test_a_published_sd15_file_predicts_as_its_authors_code_does(
    pipeline: Any, published: tuple[Path, Tensor, Tensor]
) -> None:
    folder, tokens, times = published
    unet: UNet2DConditionModel = pipeline.unet
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(TIMESTEPS), 4, 8, 8, generator=generator)
    text = torch.randn(len(TIMESTEPS), 12, WIDTH, generator=generator)
    wanted = as_the_authors(unet, x, TIMESTEPS, text, tokens, times)
    base = unet(x, TIMESTEPS, encoder_hidden_states=text).sample
    convert(folder, folder / "tokens.safetensors")
    handle = attach(pipeline, folder / "tokens.safetensors")
    found = unet(x, TIMESTEPS, encoder_hidden_states=text).sample
    handle.detach()
    assert (found - wanted).abs().max() < 1e-5
    assert (wanted - base).abs().max() > 1e-3
