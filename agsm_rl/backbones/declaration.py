"""What a kind of backbone declares: all that is particular to it, with defaults that fit most kinds.

A kind is a subclass of FrozenPipeline, or of FlowPipeline, in a file of its own, and a line of registry.py. Nothing
outside that file asks which kind it has (docs/guides/add-a-backbone.md).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from agsm_rl.adapters.token_places import TokenPlaces, UNetPlace
from agsm_rl.backbones.autoencoders import Autoencoder
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Combine, Cond, Sampler
from agsm_rl.training.guidance import Branches
from agsm_rl.training.limits import MAX_RESOLUTION
from agsm_rl.training.sizes import Resolution, size_of


class Declaration:
    """The declarations of a kind, and the questions that the rest of a backbone asks it."""

    name: str
    """What a loaded pipeline is called in exports and messages; a kind of several models may set it when loaded."""
    use: ClassVar[str]
    """The name by which a recipe asks for this class."""
    wraps: ClassVar[tuple[str, ...]]
    """The pipelines' classes: text to image first, then those that `from_pipe` makes of it."""
    loads: ClassVar[tuple[str, ...]] = ()
    """Those of them that a checkpoint may be of; empty: all."""
    called: ClassVar[tuple[str, ...]] = ()
    """Parts of what its checkpoints are called on the hub, in small letters."""
    part: ClassVar[Literal["unet", "transformer"]]
    """The denoiser's name in the pipeline."""
    denoiser_class: ClassVar[str] = ""
    """The denoiser's class in diffusers."""
    time_argument: ClassVar[str] = "timestep"
    """The argument of the denoiser's forward that says how noisy its input is; `level_of` reads it."""
    interface: ClassVar[tuple[str, ...]] = (
        *("in_channels", "cross_attention_dim"),
        *("joint_attention_dim", "pooled_projection_dim", "caption_channels"),
    )
    """Sizes in the denoiser's configuration that it must share with one that replaces it."""
    autoencoder: ClassVar[Autoencoder] = Autoencoder()
    """The kind of its VAE."""
    ends_text: ClassVar[bool] = True
    """Whether its tokenizers end a text with an end token and know the longest one; language models' do not."""
    masks_text: ClassVar[bool] = False
    """Whether `encode_text` gives a mask, which not every attention kernel can heed."""
    single_files: ClassVar[Mapping[str, str]] = {}
    """Single files in the original layout: how a tensor's name begins in those of each pipeline class, and in no other
    kind's; the prefix `model.diffusion_model.` is left out."""
    single_file_text: ClassVar[Mapping[str, str]] = {}
    """Text encoders that a single file may leave out: how their tensors' names begin where it has them."""
    without: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By pipeline class: components and settings that are given in place of the checkpoint's."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the denoiser's modules that LoRA changes by default, as in diffusers' scripts."""
    branches: ClassVar[Branches] = Branches()
    """Which rows of a call of the denoiser its pipeline gives guidance's unconditional branch."""
    _num_timesteps = 1000
    """Timesteps of the noise schedule, which the denoiser's time counts."""
    drawing: ClassVar[tuple[float, int]]
    """Guidance and steps to draw with where nothing else is said; as published."""
    pipeline: Any
    denoiser: nn.Module
    resolution: Resolution

    @classmethod
    def drawing_by_name(cls, checkpoint: str) -> tuple[float, int]:
        """`drawing` as far as the checkpoint's name tells, before it is loaded."""
        return cls.drawing

    @property
    def call_options(self) -> dict[str, Any]:
        """Arguments, besides prompts, with which the pipeline draws what this backbone predicts."""
        return size_of(self.resolution)._asdict()

    def guidance_arguments(self, guidance: float, negative_prompts: list[str] | None, count: int) -> dict[str, Any]:
        """Arguments with which the pipeline draws `count` pictures under classifier-free guidance; 1 is none.

        `negative_prompts`, one per picture, are what guidance steers away from; None is the empty prompt. Guidance that
        is an input of the denoiser is no part of it: that is an option of the kind, and `predict`'s business.
        """
        return {"guidance_scale": guidance, "negative_prompt": negative_prompts}

    @property
    def combine(self) -> Combine | None:
        """How the pipeline makes one prediction of guidance's two branches, which `encode_text` gives its `Cond`.

        None: uncond + scale · (cond − uncond).
        """
        return None

    def _draw_by(self, scheduler: str) -> None:
        raise UserError(
            f"backbone.scheduler: got {scheduler!r}, but a {type(self.pipeline).__name__} is drawn by the checkpoint's "
            "own scheduler alone; leave it out."
        )

    def _lay_out(self, memory_format: str) -> None:
        raise UserError(
            f"backbone.memory_format: got {memory_format!r}, but only a U-Net is made of convolutions; leave it out "
            f"for a {type(self.pipeline).__name__}."
        )

    def _text_width(self) -> int:
        """D of the text that the denoiser takes."""
        config: Any = self.denoiser.config
        return int(config.get("joint_attention_dim") or config.get("cross_attention_dim"))

    def _channels_of_latents(self) -> int:
        """C of the latents that the denoiser is made for; where it takes them in patches, a patch has more."""
        config: Any = self.denoiser.config
        return int(config.in_channels)

    def _usual_resolution(self, factor: int) -> int:
        """Pixels per side where the recipe gives none."""
        config: Any = self.denoiser.config
        return int(config.sample_size * factor)

    def _patch_size(self) -> int:
        return 1

    def _resolution_step(self, factor: int) -> int:
        """Of what the resolution must be a multiple, for latents and for the pipeline, which draws the samples."""
        return factor * self._patch_size()

    def _longest_side(self, factor: int) -> int:
        """Pixels of a side at most."""
        return MAX_RESOLUTION

    def encode_text(self, prompts: list[str], *, gradients: bool = False) -> Cond:
        """Encode prompts; each kind of pipeline does it its own way."""
        raise NotImplementedError

    def encode_negative(self, prompt: str) -> Cond:
        """One row: what guidance steers away from; most pipelines encode it like any prompt."""
        return self.encode_text([prompt])

    def level_of(self, timestep: Tensor) -> Tensor:
        """The noise level t in [0, 1) that `predict` was given, from what it hands the denoiser as its time."""
        return timestep / self._num_timesteps

    def token_places(self, *, layers: int | None, places: Sequence[UNetPlace] | None) -> TokenPlaces:
        """Where soft tokens enter the denoiser (adapters/token_places.py).

        `layers` and `places` are the adapter's options. UserError where they do not fit, or there are no places.
        """
        raise UserError(f"soft_tokens: a {type(self.pipeline).__name__} has no place for them yet; use lora.")

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of the forward process; each kind has its own."""
        raise NotImplementedError

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `predict` is regressed on; each kind has its own."""
        raise NotImplementedError

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The denoiser's prediction; each kind asks its own way."""
        raise NotImplementedError

    def sampler(self, num_steps: int) -> Sampler:
        """The schedule of rollouts; each kind has its own."""
        raise NotImplementedError

    def _tokens_read(self, tokenizer: str) -> int:
        """How many tokens of a prompt are read by the encoder behind this tokenizer."""
        return int(self.pipeline.components[tokenizer].model_max_length)

    def _text_options(self) -> dict[str, Any]:
        """Options of the kind that `encode_text` depends on, besides `max_sequence_length`."""
        return {}
