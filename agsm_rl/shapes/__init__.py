"""The shapes world: drawings, captions, a judge, and the base models trained on them."""
