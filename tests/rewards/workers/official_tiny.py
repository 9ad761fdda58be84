"""Runs in an official package's environment: the official workers' classes with small models, so that small files do.

`official` is the folder of the official workers; the other options are the worker's own. `by_package`: not the worker's
way of calling the package, but the package's own `score`, to compare the two.
"""

import sys

from agsm_rl_worker import serve

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 40, "head_width": 10, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}
TINY_VIT = {"img_size": 224, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 4}


def make(*, package, official, by_package=False, **options):
    sys.path.append(official)
    return {"hpsv2": hpsv2, "image_reward": image_reward}[package](by_package, options)


def hpsv2(by_package, options):
    import hpsv2_worker

    hpsv2_worker.open_clip.factory._MODEL_CONFIGS[hpsv2_worker.OfficialHPSv2.architecture] = TINY_CLIP
    reward = hpsv2_worker.OfficialHPSv2(**options)
    if not by_package:
        return reward
    from hpsv2 import img_score

    img_score.model_dict.update(model=reward.model, preprocess_val=reward.transform)

    class Package:
        images, range = "pil", (-1.0, 1.0)

        def __call__(self, images, prompts):
            pairs = zip(images, prompts, strict=True)
            return [float(img_score.score(image, prompt, cp=options["path"])[0]) for image, prompt in pairs]

    return Package()


def image_reward(by_package, options):
    import image_reward_worker
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    model_module = sys.modules["ImageReward.ImageReward"]  # the package has a class of the same name
    head = model_module.MLP
    model_module.MLP = lambda _: head(36)
    blip_pretrain.create_vit = lambda *_: (VisionTransformer(**TINY_VIT), TINY_VIT["embed_dim"])
    if not by_package:
        return image_reward_worker.OfficialImageReward(**options)
    import ImageReward
    from transformers import BertTokenizer

    # The package asks the hub for its tokenizer, and names no other way to give it.
    BertTokenizer.from_pretrained = lambda _: BertTokenizer(options["tokenizer"])
    model = ImageReward.load(options["path"], med_config=options["config"], device="cpu")

    class Package:
        images = "pil"

        def __call__(self, images, prompts):
            return [model.score(prompt, image) for image, prompt in zip(images, prompts, strict=True)]

    return Package()


if __name__ == "__main__":
    serve(make)
