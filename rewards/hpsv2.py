"""Human Preference Score v2 and v2.1 (arXiv 2306.09341): an OpenCLIP ViT-H/14 trained on people's preferences.

    score = cos(image, prompt), usually 0.2 to 0.35
The official weights are loaded into transformers' CLIPModel. Scores of the two versions cannot be compared, and the
official package silently uses 2.0; that is why `version` is required here.
"""

import html
import re
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from agsm_rl_rewards.architecture import Sizes, with_changes
from agsm_rl_rewards.clip_model import CLIPScorer
from agsm_rl_rewards.native import NativeReward, Way
from agsm_rl_rewards.preprocessing import Letterbox
from agsm_rl_rewards.tokens import Tokens
from agsm_rl_rewards.weights import WeightFile, load_whole, read_tensors, unchanged
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name

Version = Literal["2.0", "2.1"]
FILES: dict[str, str] = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
PUBLISHED: Sizes = {
    "vision": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
    },
    "text": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
    },
    "shared": {"projection_dim": 1024},
}
"""OpenCLIP's ViT-H-14, in transformers' terms."""

_OUTSIDE_THE_LAYERS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "logit_scale": "logit_scale",
    **{
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in {
            "vision_model.pre_layrnorm": "visual.ln_pre",
            "vision_model.post_layernorm": "visual.ln_post",
            "text_model.final_layer_norm": "ln_final",
        }.items()
        for kind in ("weight", "bias")
    },
}
_LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_IN_A_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip_place(key: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """A CLIPModel tensor's name in OpenCLIP's file, and how to extract it: queries, keys and values are one tensor."""
    if key in _OUTSIDE_THE_LAYERS:
        # OpenCLIP multiplies by its projections from the right.
        return _OUTSIDE_THE_LAYERS[key], Tensor.t if key.endswith("_projection.weight") else unchanged
    match = _LAYER.fullmatch(key)
    assert match is not None, key
    side, layer, part, kind = match.groups()
    start = f"{'visual.' if side == 'vision' else ''}transformer.resblocks.{layer}."
    if part in _IN_A_LAYER:
        return f"{start}{_IN_A_LAYER[part]}.{kind}", unchanged
    index = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].index(part)
    return f"{start}attn.in_proj_{kind}", lambda tensor: tensor.chunk(3)[index]


def read_open_clip(file: Path, sizes: Sizes, *, reward: str) -> Any:
    """A CLIPModel with the weights of an OpenCLIP file."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    # OpenCLIP reads text features at the highest id, the end token; its activation is the exact GELU.
    end = sizes["text"]["vocab_size"] - 1
    text = CLIPTextConfig(**sizes["text"], hidden_act="gelu", eos_token_id=end, bos_token_id=end - 1, pad_token_id=0)
    vision = CLIPVisionConfig(**sizes["vision"], hidden_act="gelu")
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), **sizes["shared"])
    clip: Any = CLIPModel(config)
    tensors = read_tensors(file, reward=reward, inside="state_dict")
    load_whole(clip, tensors, open_clip_place, unused="attn_mask", reward=reward, file=file)
    return clip


def cleaned(prompt: str) -> str:
    """A prompt as OpenCLIP cleans it: broken Unicode fixed, HTML unescaped (twice), surrounding space removed."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


def check_version(path: str, version: Version, *, reward: str) -> None:
    """UserError for the other version's official file: either would load, and the scores cannot be compared."""
    for other, name in FILES.items():
        if other != version and Path(path).name == name:
            raise UserError(f"reward '{reward}': {name} is version {other}, not the version \"{version}\" asked for.")


class HPSv2(NativeReward):
    """What people prefer, given the prompt: Human Preference Scores [B] in [-1, 1], usually 0.2 to 0.35.

    Args:
        version: `"2.0"` or `"2.1"`, in quotes; their scores cannot be compared.
        path: File, folder or hub id of the weights.
        tokenizer: Folder or hub id with CLIP's tokenizer.json (the official file has none; all CLIPs share it).
        architecture: Sizes that differ from the published ones, for your own weights: {vision: {…}, text: {…}, shared:
            {…}}.
    """

    name = "hpsv2"
    range = (-1.0, 1.0)
    licence = "Apache-2.0"

    def __init__(
        self,
        *,
        version: Version,
        path: str = "xswu/HPSv2",
        tokenizer: str = "openai/clip-vit-large-patch14",
        architecture: Mapping[str, Mapping[str, Any]] | None = None,
        preprocessing: Way = "auto",
    ) -> None:
        super().__init__(preprocessing)
        if version not in get_args(Version):
            raise unknown_name("version", str(version), "a version of HPSv2 (in quotes)", get_args(Version))
        self.version, self.sizes = version, with_changes(PUBLISHED, architecture)
        check_version(path, version, reward=self.name)
        self.weights = WeightFile(self.name, "path", path, FILES[version])
        self.tokenizer = WeightFile(self.name, "tokenizer", tokenizer, "tokenizer.json")
        for file in (self.weights, self.tokenizer):
            file.check()

    def identity(self) -> Hashable:
        """The locations of the files, and the sizes."""
        return self.weights, self.tokenizer, repr(self.sizes)

    def load(self) -> CLIPScorer:
        """The CLIP with the official weights."""
        clip = read_open_clip(self.weights.find(), self.sizes, reward=self.name)
        length = self.sizes["text"]["max_position_embeddings"]
        return CLIPScorer(clip, Tokens(self.tokenizer.find(), length=length, reward=self.name))

    def pixels(self) -> Letterbox:
        """The entire image, centred on black."""
        return Letterbox(self.network.image_size)

    def score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B]."""
        return self.network.cosine(pixels, [cleaned(prompt) for prompt in prompts])
