"""GenEval's detector: objects by Mask2Former (arXiv 2112.01527), their colours by CLIP (arXiv 2103.00020).

Both come from transformers. Post-processing follows Mask2Former's paper and GenEval's detector framework, at the size
of the image; that of transformers resizes every mask to 384 x 384 first, which distorts boxes and positions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from agsm_rl_rewards.geneval.requirements import object_names
from agsm_rl_rewards.geneval.rules import COLORS, Box, Detection, color_crop
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from agsm_rl.errors import UserError

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLASSIFIER = "openai/clip-vit-large-patch14"
MAX_DETECTIONS = 100
"""Detections kept per image, as in GenEval's detector framework."""
STORED_ABOVE = 0.05
"""Detections above this confidence are stored: far below the rules' thresholds, so that you can try other rules."""
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")

Seen = dict[str, Any]
"""A stored detection: class, score, box and, if the prompt asks for a colour, `colors` (similarities)."""


class Detector:
    """`detector(picture, colored)` → detections with confidence above 0.05, the most confident first.

    Args:
        detector: Folder or hub id of a Mask2Former trained on COCO instances.
        classifier: Folder or hub id of a CLIP.
        device: By default a GPU if there is one.
        options: What messages call the two models.

    Raises UserError, with the command that downloads them, if the models are missing.
    """

    def __init__(
        self,
        detector: str = DETECTOR,
        classifier: str = CLASSIFIER,
        *,
        device: str | None = None,
        options: tuple[str, str] = ("--detector", "--classifier"),
    ) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.names = object_names()
        # The PIL backend gives the same pixels whether or not torchvision is installed.
        self._resize = _load(AutoImageProcessor, detector, options[0], backend="pil")
        self._segment = _load_model(Mask2FormerForUniversalSegmentation, detector, options[0]).to(self.device).eval()
        _check_labels(self._segment.config.id2label, self.names, f"{options[0]} '{detector}'")
        self._crop = _load(AutoImageProcessor, classifier, options[1], backend="pil")
        self._tokenize = _load(AutoTokenizer, classifier, options[1])
        self._clip = _load_model(CLIPModel, classifier, options[1]).to(self.device).eval()
        self._colors: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, picture: Image.Image, colored: Collection[str] = ()) -> list[Seen]:
        """The detections in an RGB picture; those of the classes `colored` include their similarity to each colour."""
        inputs = self._resize(picture, return_tensors="pt")["pixel_values"].to(self.device)
        output = self._segment(pixel_values=inputs)
        scores, labels, masks = instances(
            output.class_queries_logits[0], output.masks_queries_logits[0], inputs.shape[-2:], picture.size[::-1]
        )
        seen: list[Seen] = []
        crops: list[tuple[int, Image.Image]] = []
        for score, label, mask in zip(scores, labels, masks, strict=True):
            name, box = self.names[label], box_of(mask)
            if box is None:
                continue
            if name in colored:
                crops.append((len(seen), color_crop(picture, box, mask)))
            seen.append({"class": name, "score": score, "box": list(box)})
        for index, crop in crops:
            seen[index]["colors"] = self.colors(crop, seen[index]["class"])
        return seen

    @torch.no_grad()
    def colors(self, crop: Image.Image, name: str) -> dict[str, float]:
        """The cosine similarity of a crop to each colour's classifier for that class."""
        pixels = self._crop(crop, return_tensors="pt")["pixel_values"].to(self.device)
        image = normalize(self._clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        return dict(zip(COLORS, (self._classifier(name) @ image[0]).tolist(), strict=True))

    def _classifier(self, name: str) -> Tensor:
        """One unit vector per colour, [10, D]: the normalised mean of the templates' unit vectors."""
        if name not in self._colors:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            tokens = self._tokenize(texts, padding=True, return_tensors="pt").to(self.device)
            features = normalize(self._clip.get_text_features(**tokens).pooler_output, dim=-1)
            self._colors[name] = normalize(features.unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1), dim=-1)
        return self._colors[name]


def instances(
    class_logits: Tensor, mask_logits: Tensor, input_size: Sequence[int], size: Sequence[int]
) -> tuple[list[float], list[int], list[np.ndarray]]:
    """Scores, labels and masks from Mask2Former's outputs, the highest score first.

    The score of a query and class is the class probability times the mean probability over the mask's pixels, which are
    those above 1/2.

    Args:
        class_logits: [Q, classes + 1]; the last class is "no object".
        mask_logits: [Q, h, w].
        input_size: (height, width) of the model's input.
        size: (height, width) of the returned masks (bool).
    """
    classes = class_logits.shape[-1] - 1
    probabilities = class_logits.softmax(-1)[:, :-1].flatten()
    best, index = probabilities.topk(min(MAX_DETECTIONS, len(probabilities)))
    index = index[best > STORED_ABOVE]
    best = best[best > STORED_ABOVE]
    if not len(best):
        return [], [], []
    # The classes of a query share its mask, so each mask is enlarged only once.
    queries, query_of = torch.unique(index // classes, return_inverse=True)
    options: dict[str, Any] = {"mode": "bilinear", "align_corners": False}
    logits = interpolate(mask_logits[queries, None].float(), size=tuple(input_size), **options)
    logits = interpolate(logits, size=tuple(size), **options)[:, 0]
    masks = logits > 0
    inside = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    scores = best * inside[query_of]
    order = [i for i in scores.argsort(descending=True, stable=True).tolist() if scores[i] > STORED_ABOVE]
    kept = masks.cpu().numpy()
    labels = index % classes
    return (
        [float(scores[i]) for i in order],
        [int(labels[i]) for i in order],
        [kept[int(query_of[i])] for i in order],
    )


def box_of(mask: np.ndarray) -> Box | None:
    """(left, top, right, bottom) of a mask's pixels, where right and bottom are exclusive; None for an empty mask."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(columns):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def detections(seen: Sequence[Mapping[str, Any]]) -> list[Detection]:
    """Stored detections in the form the rules take; each gets its most similar colour."""
    rows = []
    for item in seen:
        colors = item.get("colors")
        color = max(colors, key=colors.get) if colors else None
        left, top, right, bottom = item["box"]
        rows.append(Detection(item["class"], item["score"], (left, top, right, bottom), color))
    return rows


def _check_labels(labels: Mapping[int, str], names: list[str], where: str) -> None:
    """UserError unless the detector's classes are COCO's 80 in order; a few may be spelt differently."""
    matching = sum(labels.get(index) == name for index, name in enumerate(names))
    misplaced = [label for index, label in labels.items() if label in names and names.index(label) != index]
    if len(labels) != len(names) or matching < len(names) / 2 or misplaced:
        raise UserError(
            f"{where}: its {len(labels)} classes are not COCO's 80 in their order (person, bicycle, "
            f"car, …); give a detector of COCO instances, e.g. {DETECTOR}."
        )


def _load_model(kind: Any, source: str, option: str) -> Any:
    """The model with all of its weights; UserError if the checkpoint lacks some, which would stay random."""
    model, info = _load(kind, source, option, output_loading_info=True)
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise UserError(
            f"{option} '{source}': it has no fitting weights for {missing[0]} and {len(missing) - 1} others of a "
            f"{kind.__name__}; give a checkpoint of that model."
        )
    return model


def _load(kind: Any, source: str, option: str, **more: Any) -> Any:
    from safetensors import SafetensorError

    try:
        return kind.from_pretrained(source, **more)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{option} '{source}': its {kind.__name__} cannot be loaded ({reason}). Download it with "
            f"`hf download {source}` (from https://huggingface.co/{source}), or give {option} a folder with its "
            "config.json, preprocessor_config.json and model.safetensors."
        ) from error
