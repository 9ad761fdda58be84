"""A module of a user's own adapter and backbone, which tests write to a file."""

MODULE = """
from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones import StableDiffusion

class MyBase(StableDiffusion):
    wraps = ("StableDiffusionPipeline",)

class MyLoRA(LoRA):
    kind = "{module}:MyLoRA"

    def export(self):
        tensors, metadata = super().export()
        return tensors, metadata | {{"kind": self.kind}}
"""
