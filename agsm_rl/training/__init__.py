"""What a training step needs, shared by the trainer, the sources and the objectives."""
