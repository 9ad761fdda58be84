"""AGSM from images to updated tokens, against the released loop derived again in plain torch from its equations.

Nothing of the objective, the adapter, the policy or the backbone is called: the VAE's posterior is sampled, the blocks
of the denoiser are run one after another with the tokens put in by hand, and AdamW and the EMA are written out. The
random numbers are the same: one noise for all images of a group, one integer timestep for a step. As our EMA does, and
unlike the release's, the second copy of the tokens begins where the first does.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import load_backbone
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.policy import Policy
from agsm_rl.sources.pairs import Pairs
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.randomness import Draw

STEPS, TAU, GAMMA_POSITIVE, GAMMA_NEGATIVE, DECAY = 3, 0.1, 1.0, 0.1, 0.9
LOWEST_RATE, RESTART = 1e-5, 2
RATE, WEIGHT_DECAY, BETAS = 1e-3, 1e-4, (0.9, 0.999)
TOKENS, LAYERS = 4, 3


class Released:
    """The released loop on a pipeline without hooks, for a batch of one group."""

    def __init__(self, pipeline: Any, values: dict[str, Tensor]) -> None:
        self.pipeline, self.is_flow = pipeline, hasattr(pipeline, "transformer")
        self.live = {name: value.clone().requires_grad_() for name, value in values.items()}
        self.ema = {name: value.clone() for name, value in values.items()}
        self.moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in values.items()}
        self.steps = 0

    def latents(self, pixels: Tensor, noise: Tensor) -> Tensor:
        vae = self.pipeline.vae
        hidden = vae.encoder(pixels)
        mean, log_variance = (hidden if vae.quant_conv is None else vae.quant_conv(hidden)).chunk(2, dim=1)
        sample = mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise
        return (sample - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def step(self, pixels: Tensor, prompts: list[str], posterior: Tensor, noise: Tensor, level: float) -> float:
        """Learn from images in [-1, 1]; the loss."""
        with torch.no_grad():
            x0 = self.latents(pixels, posterior)
            text, pooled = self.encode(prompts)
        noise = noise.expand(len(x0), -1, -1, -1)
        if self.is_flow:
            x_t, target, timestep = (1 - level) * x0 + level * noise, noise - x0, level * 1000
        else:
            timestep = int(level * 1000)
            alpha = torch.cumprod(1 - self.pipeline.scheduler.betas, dim=0)[timestep]
            x_t, target = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise, noise
        count = len(prompts)
        image, prompt = (
            index.flatten() for index in torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
        )
        bank = (image != prompt).long()  # 0: psi+ for the image's own prompt
        inputs = (x_t[image], timestep, text[prompt], None if pooled is None else pooled[prompt], bank)
        with torch.no_grad():
            e = self.predict(self.ema, *inputs).unflatten(0, (count, count))
        p = self.predict(self.live, *inputs).unflatten(0, (count, count))
        loss = self.loss(p, e, target)
        loss.backward()
        self.update()
        return loss.item()

    def loss(self, p: Tensor, e: Tensor, v: Tensor) -> Tensor:
        count = len(p)
        positives, negatives = [], []
        for i in range(count):
            weights = torch.softmax(torch.stack([-((v[i] - e[i, j]) ** 2).mean() for j in range(count)]) / TAU, dim=0)
            mean = sum(weights[k] * e[i, k] for k in range(count))
            for j in range(count):
                delta = e[i, j] - mean
                if i == j:
                    positives.append(((p[i, j] - (v[i] + GAMMA_POSITIVE * delta)) ** 2).mean())
                else:
                    negatives.append(((p[i, j] - (v[i] - GAMMA_NEGATIVE * delta)) ** 2).mean())
        return torch.stack(positives).mean() + torch.stack(negatives).mean()

    def update(self) -> None:
        """AdamW without clipping, its rate by cosine annealing with warm restarts; then the EMA."""
        angle = math.pi * (self.steps % RESTART) / RESTART
        rate = LOWEST_RATE + (RATE - LOWEST_RATE) * (1 + math.cos(angle)) / 2
        self.steps += 1
        with torch.no_grad():
            for name, value in self.live.items():
                first, second = self.moments[name]
                value *= 1 - rate * WEIGHT_DECAY
                first.mul_(BETAS[0]).add_(value.grad, alpha=1 - BETAS[0])
                second.mul_(BETAS[1]).addcmul_(value.grad, value.grad, value=1 - BETAS[1])
                root = second.sqrt() / (1 - BETAS[1] ** self.steps) ** 0.5 + 1e-8
                value -= rate / (1 - BETAS[0] ** self.steps) * first / root
                value.grad = None
                self.ema[name] = DECAY * self.ema[name] + (1 - DECAY) * value

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        if self.is_flow:
            text, _, pooled, _ = self.pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
            return text, pooled
        options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        encoded = self.pipeline.encode_prompt(prompts, **options)
        return encoded[0], encoded[2] if len(encoded) == 4 else None

    def rows(self, tokens: dict[str, Tensor], timestep: float, bank: Tensor, layer: int) -> Tensor:
        """Tokens and their time row, [rows, n, D]."""
        time = tokens["time_tokens"][int(timestep) // 10]
        if not self.is_flow:
            return tokens["soft_tokens"][bank] + time
        return tokens["soft_tokens"][bank][:, layer] + time.reshape(LAYERS, -1)[layer]

    def predict(
        self,
        tokens: dict[str, Tensor],
        x_t: Tensor,
        timestep: float,
        text: Tensor,
        pooled: Tensor | None,
        bank: Tensor,
    ) -> Tensor:
        run = self.transformer if self.is_flow else self.unet
        return run(tokens, x_t, torch.tensor([timestep]).expand(len(x_t)), text, pooled, bank)

    def unet(
        self, tokens: dict[str, Tensor], x: Tensor, time: Tensor, text: Tensor, pooled: Tensor | None, bank: Tensor
    ) -> Tensor:
        unet = self.pipeline.unet
        rows = self.rows(tokens, float(time[0]), bank, 0)
        longer = torch.cat([text[:, :1], rows, text[:, 1:]], dim=1)
        embedded = unet.time_embedding(unet.time_proj(time).to(x))
        if pooled is not None:
            side = x.shape[-1] * self.pipeline.vae_scale_factor
            ids = torch.tensor([side, side, 0, 0, side, side]).repeat(len(x))
            sizes = unet.add_time_proj(ids).reshape(len(x), -1)
            embedded = embedded + unet.add_embedding(torch.cat([pooled, sizes], dim=-1))
        hidden = unet.conv_in(x)
        skipped = [hidden]
        for block in unet.down_blocks:
            crossed = {"encoder_hidden_states": longer} if getattr(block, "has_cross_attention", False) else {}
            hidden, more = block(hidden, embedded, **crossed)
            skipped += more
        hidden = unet.mid_block(hidden, embedded, encoder_hidden_states=longer)
        for block in unet.up_blocks:
            crossed = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
            count = len(block.resnets)
            skipped, last = skipped[:-count], tuple(skipped[-count:])
            hidden = block(hidden, temb=embedded, res_hidden_states_tuple=last, **crossed)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))

    def transformer(
        self, tokens: dict[str, Tensor], x: Tensor, time: Tensor, text: Tensor, pooled: Tensor | None, bank: Tensor
    ) -> Tensor:
        model = self.pipeline.transformer
        hidden, stream = model.pos_embed(x), model.context_embedder(text)
        embedded = model.time_text_embed(time, pooled)
        for layer, block in enumerate(model.transformer_blocks):
            if layer < LAYERS:
                stream = torch.cat([stream, self.rows(tokens, float(time[0]), bank, layer)], dim=1)
            stream, hidden = block(hidden_states=hidden, encoder_hidden_states=stream, temb=embedded)
            if layer < LAYERS:
                stream = stream[:, :-TOKENS]
        patches = model.proj_out(model.norm_out(hidden, embedded))
        size, side = model.config.patch_size, x.shape[-1] // model.config.patch_size
        patches = patches.reshape(len(x), side, side, size, size, -1)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(x.shape)


def test_tokens_after_three_steps_are_those_of_the_released_loop(each_checkpoint: Any) -> None:
    backbone = load_backbone(str(each_checkpoint), device="cpu")
    is_flow = hasattr(backbone.pipeline, "transformer")
    tokens = SoftTokens(num_tokens=TOKENS, init="normal", layers=LAYERS if is_flow else None)
    policy = Policy(backbone, {"tokens": tokens}, ema_decay=DECAY)
    plain = load_backbone(str(each_checkpoint), device="cpu").pipeline
    released = Released(plain, {name: value.detach().clone() for name, value in tokens.named_parameters()})

    source = Pairs("builtin:shapes", batch_size=4, num_images=24, latents="sample")
    pixels: list[Tensor] = []
    backbone.pipeline.vae.encoder.register_forward_pre_hook(lambda _, args: pixels.append(args[0].clone()))
    prompts: list[list[str]] = []
    encode = backbone.encode_text
    backbone.encode_text = lambda texts, **options: (prompts.append(list(texts)), encode(texts, **options))[1]  # type: ignore[method-assign]
    objective = AGSM(temperature=TAU, gamma_positive=GAMMA_POSITIVE, gamma_negative=GAMMA_NEGATIVE, noise="group")
    trainer = Trainer(
        policy,
        [Term(objective, source, name="agsm")],
        steps=STEPS,
        learning_rate=RATE,
        schedule={"use": "cosine_warm_restarts", "T_0": RESTART, "eta_min": LOWEST_RATE, "every": 1},
        weight_decay=WEIGHT_DECAY,
        betas=BETAS,
        max_grad_norm=None,
    )
    rows = torch.arange(4)
    for step in range(STEPS):
        loss = trainer.run_step()["agsm/loss"]
        draw = Draw(trainer.seed, "agsm", step)
        like = torch.empty(4, *backbone.latent_shape)
        expected = released.step(
            pixels[-1],
            prompts[-1],
            draw.noise_like(like, rows, purpose="posterior"),
            draw.noise_like(like[:1], rows[:1]),
            float(draw.shared_t(1)),
        )
        assert loss == pytest.approx(expected, rel=1e-5)
    for name, value in tokens.named_parameters():
        torch.testing.assert_close(value.detach(), released.live[name].detach(), rtol=0, atol=1e-6)
        with policy.ema_weights():
            torch.testing.assert_close(value.detach(), released.ema[name], rtol=0, atol=1e-6)
