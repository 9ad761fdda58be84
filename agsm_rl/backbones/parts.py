"""The models of a pipeline's folder, each loaded by itself, so that nothing in its files is left out or made up.

diffusers and transformers fill a weight that a file lacks with random numbers, and drop a tensor that they have no
place for, with a warning at most. Here every weight of a part must come from its files, every tensor of the files must
have a place, the files must be safetensors, and a configuration may not name code or kernels to be fetched.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import SafetensorError, safe_open
from torch import nn

from agsm_rl.backbones.empty_models import config_of, on_meta
from agsm_rl.backbones.model_index import BadPart, check_index, check_object, class_of
from agsm_rl.backbones.quantization import Quantization
from agsm_rl.backbones.quantized_layers import train_through
from agsm_rl.errors import UserError
from agsm_rl.files import parse_json, read_json

FOREIGN_KEYS = {
    "auto_map": "code of its own",
    "custom_pipelines": "code of its own",
    "quantization_config": "quantised weights, which are not supported",
}
"""Keys of a part's configuration that would have a library run or fetch more than this package's own classes."""
CONFIGURATIONS = (
    "config.json",
    "scheduler_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
)
HUB_OPTIONS = ("local_files_only", "revision")
"""Options of from_pretrained that say which files of the hub are read."""
ATTENTION_KEYS = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")


def load_parts(
    source: str,
    replaced: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    variant: str | None,
    empty: bool,
    quantization: Quantization | None = None,
) -> dict[str, Any]:
    """`replaced`, and the other models of the pipeline in `source` (a folder or hub id) by their names.

    `options` are from_pretrained's. `empty`: on torch's meta device, from the configurations alone; a folder's weight
    files are only checked to be there and whole. Raises BadPart, or whatever the libraries raise.
    """
    parts = dict(replaced)
    where = {key: value for key, value in options.items() if key in HUB_OPTIONS}
    index = DiffusionPipeline.load_config(source, **where)
    check_index(index, replaced=replaced)
    for name, entry in index.items():
        component = class_of(entry)
        if name in replaced or component is None:
            continue
        with _named(f"its {name} ({entry[1]})", source):
            if Path(source).is_dir():
                _check_objects(Path(source) / name)
            if issubclass(component, nn.Module):
                of_part = quantization if quantization and quantization.covers(name) else None
                parts[name] = _load_model(component, source, name, options, where, variant, of_part, empty=empty)
            else:
                parts[name] = component.from_pretrained(source, subfolder=name, **where)
    return parts


def _load_model(
    model_class: Any,
    source: str,
    name: str,
    options: Mapping[str, Any],
    where: Mapping[str, Any],
    variant: str | None,
    quantization: Quantization | None,
    *,
    empty: bool,
) -> Any:
    check_config(config_of(model_class, source, name, where), part=name)
    if Path(source).is_dir():
        _check_files(Path(source) / name, variant)
    if empty:
        model = on_meta(model_class, source, name, where, dtype=options["dtype"])
        if quantization is not None:
            quantization.empty(model)
        return model
    return load_whole(model_class, source, name, part=name, variant=variant, options=options, quantization=quantization)


@contextmanager
def _named(part: str, source: str) -> Iterator[None]:
    """Within the block, whatever the libraries make of a folder's files is a BadPart that names the part.

    Errors of the hub and of missing files say more as they are.
    """
    try:
        yield
    except (BadPart, UserError, MemoryError, torch.OutOfMemoryError, SafetensorError, FileNotFoundError):
        raise
    except Exception as error:
        if not Path(source).is_dir():
            raise
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BadPart(
            f"{part} cannot be loaded from its files ({cause}); they are damaged or of another class. Correct "
            "model_index.json, or take another copy."
        ) from error


def _check_objects(folder: Path) -> None:
    """BadPart for a configuration that is not a JSON object."""
    for name in CONFIGURATIONS:
        if (folder / name).is_file():
            try:
                content = read_json(folder / name)
            except UserError as error:
                raise BadPart(f"its {folder.name} cannot be loaded: {error} Take another copy.") from error
            check_object(content, f"{folder.name}/{name}")


def load_whole(
    model_class: Any,
    source: str,
    subfolder: str | None,
    *,
    part: str,
    variant: str | None,
    options: Mapping[str, Any],
    quantization: Quantization | None = None,
) -> Any:
    """A model with every weight from its files and every tensor of the files in place; BadPart where it is not so."""
    options = dict(options)
    if quantization is not None:
        where = {key: value for key, value in options.items() if key in HUB_OPTIONS}
        options["quantization_config"] = quantization.config(
            model_class, on_meta(model_class, source, subfolder, where, dtype=options["dtype"])
        )
    model, report = model_class.from_pretrained(
        source, subfolder=subfolder, variant=variant, use_safetensors=True, output_loading_info=True, **options
    )
    _refuse(f"its {part} lacks", "weight", report["missing_keys"])
    unused = [name for name in report["unexpected_keys"] if not name.endswith("position_ids")]  # CLIP files before 2023
    _refuse(f"its {part} has no place for", "tensor", unused)
    _refuse(f"its {part} has another shape than its configuration says for", "tensor", report["mismatched_keys"])
    if quantization is not None:
        train_through(model)
    return model


def check_complete(pipeline: Any) -> None:
    """BadPart where a model of a loaded pipeline lacks weights, which diffusers leaves on the meta device."""
    for part, model in pipeline.components.items():
        if isinstance(model, nn.Module):
            named = [*model.named_parameters(), *model.named_buffers()]
            _refuse(f"its {part} lacks", "weight", [name for name, tensor in named if tensor.is_meta])


def check_single_file(source: str, config: str, *, replaced: Mapping[str, Any], local_only: bool) -> None:
    """BadPart where a file in the original layout lacks weights of the diffusers models that `config` describes."""
    with safe_open(source, framework="pt") as file:
        # Whatever a tensor holds: names and shapes are all that the converters look at.
        names = list(file.keys())
        tensors = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    for name, entry in DiffusionPipeline.load_config(config, local_files_only=local_only).items():
        model_class = class_of(entry)
        convert = SINGLE_FILE_LOADABLE_CLASSES.get(entry[1], {}).get("checkpoint_mapping_fn") if model_class else None
        if convert is None or name in replaced:
            continue
        settings = dict(model_class.load_config(config, subfolder=name, local_files_only=local_only))
        held = convert(config=settings, checkpoint=dict(tensors))
        needed = on_meta(model_class, config, name, {"local_files_only": local_only}).state_dict()
        _refuse(f"its {name} lacks", "weight", [key for key in needed if key not in held])


def check_tokenizers(pipeline: Any, *, ends_text: bool = True) -> None:
    """BadPart for a tokenizer whose files are not all there: it would cut nothing, or know hardly a word.

    ends_text: whether tokenizers of this kind end a text and know its length; those of language models do not.
    """
    for name, tokenizer in pipeline.components.items():
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        encoder_name = name.replace("tokenizer", "text_encoder")
        encoder = getattr(pipeline, encoder_name, None)
        if encoder is None:
            continue
        embeddings = encoder.get_input_embeddings().num_embeddings
        config = encoder.config
        # A T5 has no such limit, and its pipeline says how long its texts are.
        longest = getattr(config, "max_position_embeddings", None)
        if ends_text and longest is not None and tokenizer.model_max_length > longest:
            raise BadPart(
                f"its {name} has model_max_length {tokenizer.model_max_length:.6g}, but its {encoder_name} reads "
                f"{longest} tokens; {name}/tokenizer_config.json is missing or of another model."
            )
        if not embeddings / 2 <= len(tokenizer) <= embeddings:
            raise BadPart(
                f"its {name} knows {len(tokenizer)} tokens, its {encoder_name} {embeddings}; "
                f"{name}/tokenizer.json (or vocab.json and merges.txt) is missing or of another model."
            )
        tokens = tokenizer("a").input_ids if ends_text else []
        if ends_text and (tokenizer.eos_token_id is None or tokenizer.eos_token_id not in tokens):
            raise BadPart(
                f"its {name} ({type(tokenizer).__name__}) does not end a text with an end token, which its "
                f"{encoder_name} ({type(encoder).__name__}) was trained with; correct its class in model_index.json."
            )


def check_noise(scheduler: Any) -> None:
    """BadPart for a scheduler's betas that are not usable numbers: every picture would be noise."""
    kept = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(kept, torch.Tensor) and not kept.is_meta and not torch.isfinite(kept).all():
        raise BadPart("its scheduler_config.json has betas that are not finite numbers; correct it.")


def check_scheduler(scheduler: Any, key: str, example: str) -> None:
    """UserError for a scheduler of another kind of diffusion, whose configuration lacks `key`: no noise would fit."""
    if key not in scheduler.config:
        raise UserError(
            f"backbone.checkpoint: its scheduler is a {type(scheduler).__name__}, which has another noise schedule "
            f"than this kind of model is trained with; give one such as {example} in model_index.json and scheduler/."
        )


def check_config(config: Mapping[str, Any], *, part: str) -> None:
    """BadPart for a configuration that names code, kernels or a quantisation."""
    for key, meaning in FOREIGN_KEYS.items():
        if config.get(key):
            raise BadPart(f"its {part}'s config.json has '{key}' ({meaning}); remove it, or take another copy.")
    for key in ATTENTION_KEYS:
        if isinstance(config.get(key), str) and not config[key].isidentifier():
            raise BadPart(
                f"its {part}'s config.json asks for attention '{config[key]}', a kernel to be downloaded; remove it."
            )


def only_variant(folder: Path) -> str | None:
    """The variant of a folder's weight files, such as fp16 of `model.fp16.safetensors`, if they are all of one."""
    variants = {_variant_of(file) for file in folder.glob("*.safetensors")}
    return variants.pop() if len(variants) == 1 else None


def _refuse(what: str, noun: str, names: Iterable[str]) -> None:
    names = sorted(str(name) for name in names)
    if names:
        raise BadPart(f"{what} {len(names)} {noun}{'s' if len(names) > 1 else ''}, first '{names[0]}'.")


def _variant_of(file: Path) -> str | None:
    """Of a part of several too: `model.fp16-00001-of-00002.safetensors`, or the other way round as it once was."""
    named = re.fullmatch(r"[^.]+\.([^.-]+)(-\d+-of-\d+)?\.safetensors", file.name)
    return named.group(1) if named else None


def _check_files(folder: Path, variant: str | None) -> None:
    """The folder has safetensors of the variant, each whole, and its index names no other kind of file."""
    present = sorted(folder.glob("*.safetensors"))
    # Where a part has no files of the variant, diffusers takes its plain ones.
    files = [file for file in present if _variant_of(file) == variant] or [
        file for file in present if not _variant_of(file)
    ]
    indexed = [part for index in sorted(folder.glob("*.safetensors.index*.json")) for part in _indexed(index)]
    for part in indexed:
        named = part.relative_to(folder)  # as it is written, `..` too
        if part.suffix != ".safetensors":
            raise BadPart(
                f"the weight index of its {folder.name} names '{named}'; only .safetensors files are read, because a "
                "pickled file could run code."
            )
        if len(named.parts) != 1:
            raise BadPart(
                f"the weight index of its {folder.name} names '{named}', a file in another folder; only files beside "
                "the index are read. Put it there and correct the index."
            )
    if not files:
        raise FileNotFoundError(f"there are no .safetensors in {folder}{' except for variants' if present else ''}.")
    for file in files:
        with safe_open(file, framework="pt"):  # reads the header, which says how long the file must be
            pass
    for part in sorted(set(indexed)):
        if _variant_of(part) == _variant_of(files[0]) and not part.is_file():
            raise FileNotFoundError(f"{part}, which the weight index names, is missing.")


def _indexed(index: Path) -> list[Path]:
    """The files that a weight index names, in its folder; BadPart where it is not one."""
    content = parse_json(index.read_text(encoding="utf-8"), where=index.name)
    weight_map = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadPart(
            f"{index.parent.name}/{index.name} has no weight_map from tensors' names to files' names; take another "
            "copy."
        )
    for name in weight_map.values():
        if Path(name).is_absolute():
            raise BadPart(f"the weight index of its {index.parent.name} names '{name}', an absolute path; correct it.")
    return [index.parent / name for name in dict.fromkeys(weight_map.values())]
