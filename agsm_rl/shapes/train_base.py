"""Train an embedded base of the shapes world from nothing: `python -m agsm_rl.shapes.train_base WORK_DIR OUT_DIR`.

Three stages, as Stable Diffusion was made: an autoencoder; a CLIP text encoder, trained contrastively and then frozen;
a denoiser, trained on captions that are careful, plain and careless (world.web_caption). Each stage is seeded, writes
its log to WORK_DIR, and goes on from its newest checkpoint when started again.

The text encoder never learns what a reliability cue means (during its own training cues are drawn at random), but every
word stays readable at its own place, and padding says nothing. What the denoiser makes of a cue therefore comes in
through the cue's own token, and soft tokens, which cannot change other tokens, can do the same.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from agsm_rl.shapes import world

TEXT_LENGTH = 20
TEXT_WIDTH = 96
DOWNSAMPLING = 4
# The squared noise error is weighted by 1 / alpha_bar up to this, as v-prediction weights it: composition is settled at
# high noise, where the plain error hardly counts.
LARGEST_WEIGHT = 50.0
# The up blocks get the empty prompt in this share of the images, so that the down and mid blocks, where soft tokens are
# seen, learn to carry the prompt; left to themselves, the up blocks of so small a U-Net carry nearly all of it.
UP_TEXT_DROPOUT = 0.8


@dataclass(frozen=True)
class Settings:
    """Sizes of the data and the stages; the defaults make a base like the shipped one."""

    scenes: int = 60_000
    vae_steps: int = 2_500
    text_steps: int = 2_500
    denoiser_steps: int = 20_500
    batch_size: int = 32
    seed: int = 0


def draw_data(settings: Settings, work: Path) -> tuple[list[world.Requirement], Tensor]:
    """The training scenes' requirements and their images, uint8 [N, 3, 32, 32]; kept in WORK_DIR."""
    path = work / "scenes.pt"
    if path.exists():
        kept = torch.load(path, weights_only=False)  # our own file, written a few lines below
        return kept["requirements"], kept["images"]
    rng = np.random.default_rng(settings.seed)
    scenes = [world.draw_scene(rng, world.draw_requirement(rng)) for _ in range(settings.scenes)]
    images = _images(scenes)
    requirements = [scene.requirement for scene in scenes]
    torch.save({"requirements": requirements, "images": images}, path)
    return requirements, images


def _images(scenes: list[world.Scene]) -> Tensor:
    pixels = np.stack([np.asarray(world.render(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _to_model_range(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def run_stage(
    name: str, work: Path, steps: int, state: dict[str, Any], step: Callable[[int], dict[str, float]], every: int = 500
) -> None:
    """Run `step` for each number up to `steps`; checkpoint `state` (things with a state_dict) and log every `every`."""
    path, start = work / f"{name}.pt", 0
    if path.exists():
        kept = torch.load(path, weights_only=True)
        for key, part in state.items():
            part.load_state_dict(kept[key])
        start = int(kept["step"])
    began = time.time()
    sums: dict[str, float] = {}
    for number in range(start, steps):
        for key, value in step(number).items():
            sums[key] = sums.get(key, 0.0) + value
        if (number + 1) % every == 0 or number + 1 == steps:
            row = {"stage": name, "step": number + 1, "seconds": round(time.time() - began, 1)}
            count = (number % every) + 1
            row |= {key: round(value / count, 5) for key, value in sums.items()}
            with (work / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            kept = {key: part.state_dict() for key, part in state.items()} | {"step": number + 1}
            torch.save(kept, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
            sums = {}


def train_vae(settings: Settings, work: Path, images: Tensor) -> AutoencoderKL:
    """An autoencoder to 8 x 8 x 4 latents; each channel's mean 0 and variance 1 are folded into 1 x 1 convolutions."""
    torch.manual_seed(settings.seed + 1)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.IMAGE_SIZE,
        scaling_factor=1.0,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 300, settings.vae_steps)

    def step(number: int) -> dict[str, float]:
        rng = np.random.default_rng((settings.seed, 1, number))
        x = _to_model_range(images[rng.integers(0, len(images), settings.batch_size)])
        generator = torch.Generator().manual_seed(number)
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample(generator=generator)).sample
        error = (decoded - x).abs().mean() + 2 * F.mse_loss(decoded, x)
        divergence = posterior.kl().mean() / x[0].numel()
        (error + 1e-3 * divergence).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return {"error": error.item(), "kl": divergence.item()}

    run_stage("vae", work, settings.vae_steps, {"model": vae, "optimizer": optimizer, "schedule": schedule}, step)
    _whiten(vae, images[:4096])
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def _whiten(vae: AutoencoderKL, images: Tensor) -> None:
    """Scale and shift each latent channel to mean 0 and variance 1 without changing what the autoencoder computes."""
    latents = torch.cat([vae.encode(_to_model_range(part)).latent_dist.mean for part in images.split(256)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] /= std[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / std
    quant.bias[4:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


def make_tokenizer(out: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is the world's words; any other text falls back to bytes."""
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(),
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, end_of_word_suffix="</w>", initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    bpe.train_from_iterator([" ".join(world.vocabulary())], trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    words = list(dict.fromkeys([*words, "<|startoftext|>", "<|endoftext|>"]))
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(out / "tokenizer")
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [B, TEXT_LENGTH], padded as the pipeline pads."""
    batch = tokenizer(captions, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    return batch.input_ids


class ImageTower(nn.Sequential):
    """The other half of the contrastive training; thrown away afterwards."""

    def __init__(self) -> None:
        channels = (3, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for wide, narrow in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(wide, narrow, 3, stride=2, padding=1), nn.GroupNorm(8, narrow), nn.SiLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(512, 128))


def contrasting_scenes(settings: Settings, count: int) -> list[world.Scene]:
    """`count` pairs of scenes, one after the other, that differ as a right caption differs from a careless one.

    They are the text encoder's hard negatives.
    """
    rng = np.random.default_rng((settings.seed, 2))
    scenes: list[world.Scene] = []
    while len(scenes) < 2 * count:
        first = world.draw_requirement(rng)
        second = world.wrong_requirement(first)
        if not world.is_held_out(second):
            scenes += [world.draw_scene(rng, first), world.draw_scene(rng, second)]
    return scenes


def train_text_encoder(settings: Settings, work: Path, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's contrastive objective (arXiv 2103.00020) with hard negatives; cues are random and mean nothing yet."""
    torch.manual_seed(settings.seed + 2)
    end = tokenizer.eos_token_id
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
        hidden_act="quick_gelu",
    )
    encoder, tower, project = CLIPTextModel(config), ImageTower(), nn.Linear(TEXT_WIDTH, 128, bias=False)
    read = nn.Linear(TEXT_WIDTH, len(tokenizer))
    model = nn.ModuleDict({"encoder": encoder, "tower": tower, "project": project, "read": read})
    temperature = nn.Parameter(torch.tensor(2.5))
    model.register_parameter("temperature", temperature)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, 300, settings.text_steps)
    scenes: list[world.Scene] = []
    cues = (*world.CAREFUL_CUES, *world.CARELESS_CUES)

    def caption(scene: world.Scene, rng: np.random.Generator) -> str:
        text = world.describe(scene.requirement, rng)
        return f"{text}, {rng.choice(cues)}" if rng.random() < 0.6 else text

    def step(number: int) -> dict[str, float]:
        if not scenes:  # drawn when first needed: a finished stage does not need them again
            scenes.extend(contrasting_scenes(settings, 10_000))
        rng = np.random.default_rng((settings.seed, 3, number))
        first = 2 * rng.choice(len(scenes) // 2, 96, replace=False)
        chosen = np.concatenate([first, first + 1])
        ids = tokenize(tokenizer, [caption(scenes[index], rng) for index in chosen])
        found = encoder(ids)
        text = F.normalize(project(found.pooler_output), dim=-1)
        # Each word must be readable where it stands, also a cue that the sentence as a whole ignores; and padding must
        # say nothing: otherwise a denoiser reads whole sentences off it, and no single token has a hold on that.
        words = ids != end
        reading = F.cross_entropy(read(found.last_hidden_state[words]), ids[words])
        padding = found.last_hidden_state[(ids == end).cumsum(1) > 1]
        spread = (padding - padding.mean(0)).square().mean()
        images = _images([scenes[index] for index in chosen])
        seen = F.normalize(tower(_to_model_range(images)), dim=-1)
        logits = temperature.exp().clamp(max=100) * text @ seen.T
        # Two scenes with the same requirement are both right; do not set one against the other.
        same = _same([scenes[index].requirement for index in chosen])
        logits = logits.masked_fill(same & ~torch.eye(len(chosen), dtype=torch.bool), -1e4)
        labels = torch.arange(len(chosen))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        (loss + reading + spread).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        accuracy = (logits.argmax(1) == labels).float().mean()
        figures = {"loss": loss, "accuracy": accuracy, "reading": reading, "spread": spread}
        return {name: value.item() for name, value in figures.items()}

    run_stage("text", work, settings.text_steps, {"model": model, "optimizer": optimizer, "schedule": schedule}, step)
    return encoder.requires_grad_(False).eval()


def _same(requirements: list[world.Requirement]) -> Tensor:
    names = {requirement: index for index, requirement in enumerate(dict.fromkeys(requirements))}
    index = torch.tensor([names[requirement] for requirement in requirements])
    return index[:, None] == index[None]


def make_denoiser() -> UNet2DConditionModel:
    """Two levels with two transformer layers a block where soft tokens are seen (down, mid), one in the up blocks."""
    return UNet2DConditionModel(
        sample_size=world.IMAGE_SIZE // DOWNSAMPLING,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        transformer_layers_per_block=[2, 2],
        reverse_transformer_layers_per_block=[1, 1],
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(4, 4),
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """DDPM's noise schedule, which ends in pure noise (alpha_bar 4e-5).

    Stable Diffusion 1.5's ends at alpha_bar 5e-3, where 8 x 8 latents still show colours and places: a model trained on
    it looks there for the composition rather than into the prompt.
    """
    return DDIMScheduler(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean latents [N, 4, 8, 8] of all training images."""
    return torch.cat([vae.encode(_to_model_range(part)).latent_dist.mean for part in images.split(256)])


def train_denoiser(
    settings: Settings,
    work: Path,
    requirements: list[world.Requirement],
    latents: Tensor,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
) -> UNet2DConditionModel:
    """Noise prediction on web captions (10 % dropped for classifier-free guidance); returns the EMA weights."""
    torch.manual_seed(settings.seed + 3)
    unet, scheduler = make_denoiser(), make_scheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=6e-4, weight_decay=1e-3, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 300, settings.denoiser_steps)
    ema = EMAModel(unet.parameters(), decay=0.999)
    with torch.no_grad():
        empty = text_encoder(tokenize(tokenizer, [""])).last_hidden_state
    up_cond: list[Tensor] = []

    def give_up_cond(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "encoder_hidden_states": up_cond[0]}

    hooks = [block.register_forward_pre_hook(give_up_cond, with_kwargs=True) for block in unet.up_blocks]

    def step(number: int) -> dict[str, float]:
        rng = np.random.default_rng((settings.seed, 4, number))
        chosen = rng.integers(0, len(latents), settings.batch_size)
        captions = ["" if rng.random() < 0.1 else world.web_caption(requirements[index], rng) for index in chosen]
        with torch.no_grad():
            cond = text_encoder(tokenize(tokenizer, captions)).last_hidden_state
        dropped = torch.from_numpy(rng.random(len(chosen)) < UP_TEXT_DROPOUT)
        up_cond[:] = [torch.where(dropped[:, None, None], empty, cond)]
        generator = torch.Generator().manual_seed(number)
        x0 = latents[chosen]
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(0, 1000, (len(x0),), generator=generator)
        weight = (1 / scheduler.alphas_cumprod[t]).clamp(max=LARGEST_WEIGHT)
        error = (unet(scheduler.add_noise(x0, noise, t), t, cond).sample - noise).square().mean(dim=(1, 2, 3))
        loss = (weight * error).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        return {"loss": loss.item()}

    state = {"model": unet, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    run_stage("denoiser", work, settings.denoiser_steps, state, step)
    for hook in hooks:
        hook.remove()
    ema.copy_to(unet.parameters())
    return unet.requires_grad_(False).eval()


def assemble(
    *, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as a pipeline of SD1.5's layout, without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main(
    work: Annotated[Path, typer.Argument(help="where data, checkpoints and the log are kept")],
    out: Annotated[Path, typer.Argument(help="where the pipeline folder is written")],
    scenes: int = Settings.scenes,
    vae_steps: int = Settings.vae_steps,
    text_steps: int = Settings.text_steps,
    denoiser_steps: int = Settings.denoiser_steps,
    seed: int = Settings.seed,
    threads: Annotated[int, typer.Option(help="CPU threads; fixed, because sums depend on their order")] = 2,
) -> None:
    """Train the SD1.5-layout base of the shapes world and write its pipeline folder."""
    torch.set_num_threads(threads)
    settings = Settings(scenes, vae_steps, text_steps, denoiser_steps, seed=seed)
    work.mkdir(parents=True, exist_ok=True)
    requirements, images = draw_data(settings, work)
    tokenizer = make_tokenizer(work)
    text_encoder = train_text_encoder(settings, work, tokenizer)
    vae = train_vae(settings, work, images)
    latents = encode_all(vae, images)
    unet = train_denoiser(settings, work, requirements, latents, tokenizer, text_encoder)
    pipeline = assemble(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet)
    pipeline.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
