# /// script
# requires-python = ">=3.10,<3.12"
# dependencies = ["hpsv3==1.0.0"]
# ///
"""HPSv3 (arXiv 2508.03789) as a worker: the authors' package, in an environment that uv makes for it.

    rewards: {hpsv3: {use: worker, script: examples/hpsv3_worker.py, weight: 0.1}}      # with --allow-command

The weights are fetched from MizzenAI/HPSv3 on the hub when the worker starts.
"""

from agsm_rl_worker import serve


class HPSv3:
    """The mean of the preference that HPSv3 predicts; its standard deviation is left out."""

    images = "pil"
    packages = ("hpsv3", "transformers", "torch")

    def __init__(self, *, device="cuda", batch_size=8):
        from hpsv3 import HPSv3RewardInferencer

        self.model, self.batch_size = HPSv3RewardInferencer(device=device), batch_size

    def __call__(self, images, prompts):
        import torch

        scores = []
        with torch.no_grad():
            for start in range(0, len(prompts), self.batch_size):
                part = slice(start, start + self.batch_size)
                scores += self.model.reward(images[part], prompts[part])[:, 0].float().tolist()
        return scores


if __name__ == "__main__":
    serve(HPSv3)
