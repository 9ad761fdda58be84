"""A picture drawn by a pipeline, the same at every call."""

import torch


def draw(pipeline):
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline("a red circle", num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="pt")
    return torch.as_tensor(drawn.images)
