"""A TRL script runs on every kind of base."""

import torch
from diffusers import DiffusionPipeline

from agsm_rl.compat.trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline


def test_a_script_runs_on_every_kind_of_base(each_checkpoint, tmp_path):
    config = DDPOConfig(
        num_epochs=2, sample_num_steps=3, sample_batch_size=2, mixed_precision="no", logdir=str(tmp_path)
    )
    config.train_learning_rate = 0.1
    pipeline = DefaultDDPOStableDiffusionPipeline(str(each_checkpoint))
    trainer = DDPOTrainer(
        config, lambda images, *_: (images.mean(dim=(1, 2, 3)), {}), lambda: ("a red star", {}), pipeline
    )
    figures = []
    run_step = trainer._trainer.run_step
    trainer._trainer.run_step = lambda: figures.append(run_step()) or figures[-1]
    trainer.train()
    assert figures[0]["trl/ratio_deviation"] < 1e-5
    trainer.save_pretrained(tmp_path / "result")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "result")
    plain.load_lora_weights(tmp_path / "result")
    drawn = [
        pipe("a red star", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
        for pipe in (plain, pipeline.sd_pipeline)
    ]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)
