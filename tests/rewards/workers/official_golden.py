"""Runs in an official package's environment: its model classes, small and filled by formula, on the golden inputs.

`official` and `golden` are the folders of the official workers and of the golden files. Prompts are row numbers.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch
from agsm_rl_worker import serve


class Golden:
    """The official score of golden row `prompt`, whatever the images; the official transform is compared as well."""

    def __init__(self, *, package: str, official: str, golden: str) -> None:
        sys.path += [official, golden]
        import_module({"hpsv2": "hpsv2_worker", "imagereward": "image_reward_worker"}[package])
        import formula

        self.formula = formula
        self.inputs = json.loads((Path(golden) / f"{package}_tiny.json").read_text())
        self.ids = torch.tensor(self.inputs["ids"])
        transform, self.score = getattr(self, package)()
        self.compare(transform)

    def compare(self, transform) -> None:
        for size, values in self.inputs["preprocess"].items():
            width, height = map(int, size.split("x"))
            found = transform(self.formula.picture(width, height)).flatten()[::9001]
            torch.testing.assert_close(found, torch.tensor(values), rtol=0, atol=1e-5)

    def fill(self, model) -> None:
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        wanted = {key: shape for key, shape in self.inputs["shapes"].items() if not key.endswith("position_ids")}
        shapes = {key: shapes[key] for key in wanted}
        assert shapes == wanted
        missing, unexpected = model.load_state_dict(self.formula.weights(wanted), strict=False)
        assert not unexpected
        assert all(key.endswith(("position_ids", "attn_mask")) for key in missing), missing
        model.eval()

    def hpsv2(self):
        from hpsv2.src import open_clip
        from hpsv2.src.open_clip.transform import image_transform

        model = open_clip.CLIP(**self.inputs["cfg"], output_dict=True)
        self.fill(model)

        def score(row):
            found = model(self.formula.pixels(len(self.ids), 3, 28, 28), self.ids)
            return (found["image_features"] @ found["text_features"].T)[row, row]

        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        return image_transform(224, is_train=False, mean=mean, std=std, resize_longest_max=True), score

    def imagereward(self):
        from ImageReward.ImageReward import MLP, ImageReward, _transform
        from ImageReward.models.BLIP.med import BertConfig, BertModel
        from ImageReward.models.BLIP.vit import VisionTransformer

        model = ImageReward.__new__(ImageReward)
        torch.nn.Module.__init__(model)
        blip = model.blip = torch.nn.Module()
        blip.visual_encoder = VisionTransformer(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=4)
        text = {"hidden_size": 36, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6}
        text |= {"vocab_size": 120, "max_position_embeddings": 64, "encoder_width": 48}
        config = BertConfig(**text, add_cross_attention=True, bos_token_id=1, sep_token_id=2)
        blip.text_encoder = BertModel(config=config, add_pooling_layer=False)
        for name in ("vision_proj", "text_proj"):  # in the official files, and not used
            rows, columns = self.inputs["shapes"][f"blip.{name}.weight"]
            blip.add_module(name, torch.nn.Linear(columns, rows))
        model.mlp, model.device = MLP(36), "cpu"
        model.mean, model.std = 0.16717362830052426, 1.0333394966054072
        self.fill(model)
        mask = torch.tensor(self.inputs["att"])
        images = self.formula.pixels(len(self.ids), 3, 32, 32)
        return _transform(224), lambda row: model.score_gard(self.ids, mask, images)[row, 0]

    @torch.no_grad()
    def __call__(self, images, prompts):
        return [float(self.score(int(prompt))) for prompt in prompts]


if __name__ == "__main__":
    serve(Golden)
