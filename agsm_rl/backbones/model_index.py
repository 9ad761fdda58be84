"""A pipeline's model_index.json: the classes of its parts, which must be ordinary ones of diffusers or transformers."""

import inspect
import json
from collections.abc import Mapping
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from agsm_rl.backbones.empty_models import on_meta

NEEDED = ("vae", "unet", "transformer", "scheduler")
"""Parts without which no pipeline draws."""
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
COMPONENTS = (
    nn.Module,
    diffusers.SchedulerMixin,
    transformers.PreTrainedTokenizerBase,
    transformers.ImageProcessingMixin,
    transformers.FeatureExtractionMixin,
)


class BadPart(ValueError):
    """What is wrong with one part of a pipeline, for the message that names the pipeline."""


def check_object(content: Any, file: str) -> None:
    """BadPart for the content of a JSON file that is not an object."""
    if not isinstance(content, Mapping):
        raise BadPart(f"its {file} holds {json.dumps(content):.60}, but must be a JSON object; take another copy.")


def check_index(index: Mapping[str, Any], *, replaced: Mapping[str, Any]) -> None:
    """BadPart for a model_index.json with a component that is not an ordinary class of diffusers or transformers.

    diffusers before 0.41 imports any library that is named there. Those that are `replaced` are not loaded.
    """
    check_object(index, "model_index.json")
    pipeline_class = getattr(diffusers, str(index.get("_class_name")), None)
    parameters = inspect.signature(pipeline_class).parameters if isinstance(pipeline_class, type) else {}
    needed = [name for name in NEEDED if name in parameters]
    if "text_encoder_2" not in parameters:  # pipelines of several encoders do without some
        needed += [name for name in ("text_encoder", "tokenizer") if name in parameters]
    for name in {**index, **dict.fromkeys(needed)}:
        entry = index.get(name)
        if name.startswith("_") or name in replaced:
            continue
        if entry is None or isinstance(entry, list | tuple) and entry and set(entry) == {None}:
            if name in needed:
                raise BadPart(f"model_index.json names no {name}, which its pipeline needs; take a complete copy.")
        elif not _is_flag(entry, name, parameters) and class_of(entry) is None:
            raise BadPart(
                f"its {name} is {entry!r:.100} in model_index.json, but must be [library, class], as in "
                '["diffusers", "AutoencoderKL"]; models, schedulers, tokenizers and image processors of diffusers and '
                "transformers are loaded, and no other code."
            )


def models_of(source: str) -> dict[str, Any]:
    """The models of the pipeline in `source` (a folder or hub id), without data, by their names."""
    index = DiffusionPipeline.load_config(source)
    check_index(index, replaced={})
    classes = {name: component for name, entry in index.items() if (component := class_of(entry)) is not None}
    return {
        name: on_meta(component, source, name, {})
        for name, component in classes.items()
        if issubclass(component, nn.Module)
    }


def class_of(entry: Any) -> Any:
    """The class of a component in model_index.json, if it is one of COMPONENTS of a library that we load."""
    if not isinstance(entry, list | tuple) or len(entry) != 2 or not all(isinstance(name, str) for name in entry):
        return None
    named = getattr(LIBRARIES.get(entry[0]), entry[1], None)
    return named if isinstance(named, type) and issubclass(named, COMPONENTS) else None


def _is_flag(entry: Any, name: str, parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether an entry of model_index.json is a setting of the pipeline's, such as `requires_safety_checker`."""
    if isinstance(entry, list | tuple):
        return False
    return name not in parameters or isinstance(parameters[name].default, bool) or name == "add_watermarker"
