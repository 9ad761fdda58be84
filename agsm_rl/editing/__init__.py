"""Text-guided editing of images: by inversion with any model, by FlowEdit with flow models."""
