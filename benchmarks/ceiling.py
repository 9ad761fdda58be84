"""This machine's ceiling for an AGSM step, and the share of it that our step reaches.

    python benchmarks/ceiling.py [--size embedded | sd15] [--dtype float32] [--threads 2] [--device cpu | cuda]

A step is recorded operator by operator. Each distinct call (operator, shapes, strides) is then repeated alone, with its
data in the caches, and its best time counts as often as the step calls it. The sum over matrix products, convolutions
and attention is the time below which no step that computes them can go; `reachable` is how many times faster than the
published loop a step would be that took no other time at all. With one thread, CPU seconds count, which other work on
the machine does not stretch; with more, keep the machine quiet. SD1.5's size on a CPU is recorded on tensors without
data, for one row of 512 px, and no step is timed.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import measure
import torch
import typer
from agsm_step import Sides
from bases import Size, options_of
from full_size_models import TEXT_LENGTH
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation"),
    "convolutions": ("convolution", "convolution_backward", "cudnn_convolution"),
    "attention": ("scaled_dot_product",),
}
OTHER = "other operators"
ROWS, PROMPTS = 4, 4
LARGE = 2048
"""Rows and columns of the large matrix product that stands for the data sheet's peak."""
DTYPES = ("float32", "bfloat16")
Call = tuple[Any, tuple[Any, ...], tuple[Any, ...]]


def kind_of(name: str) -> str:
    """The kind of an operator, by its name without the overload."""
    if "scaled_dot_product" in name:
        return "attention"
    return next((kind for kind, names in KINDS.items() if name in names), OTHER)


def kind_of_call(call: Call) -> str:
    """The kind of a recorded call's operator."""
    return kind_of(call[0].overloadpacket.__name__)


class Recorder(TorchDispatchMode):
    """Counts the distinct calls of operators that compute something; views and allocations are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        views = any(given.alias_info is not None and not given.alias_info.is_write for given in func._schema.returns)
        if not views and not name.startswith(("empty", "new_empty", "_local_scalar", "is_", "equal", "item")):
            with suppress(TypeError):  # something unhashable, which no product has
                self.calls[func, described(args), described(sorted((kwargs or {}).items()))] += 1
        return func(*args, **(kwargs or {}))


def described(values: Iterable[Any]) -> tuple[Any, ...]:
    """Arguments as something to count: tensors by what they are, lists as tuples."""

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return ("tensor", tuple(value.shape), tuple(value.stride()), value.dtype, value.device.type)
        return ("list", *map(one, value)) if isinstance(value, list | tuple) else value

    return tuple(one(value) for value in values)


def made(value: Any) -> Any:
    """An argument again, from its description; tensors hold random numbers, or zeros if they hold no numbers."""
    if not isinstance(value, tuple):
        return value
    if value[0] == "list":
        return [made(part) for part in value[1:]]
    _, shape, stride, dtype, device = value
    size = 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
    base = torch.zeros(size, dtype=dtype, device=device)
    if dtype.is_floating_point:
        base.normal_()
    return torch.as_strided(base, shape, stride)


def best_seconds(run: Callable[[], Any], device: str) -> float:
    """The best time of a call: of at least two calls and 20 ms of them or, on a GPU, of three times ten in a row.

    CPU seconds with one thread, else wall-clock seconds.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    run()
    if device != "cpu":
        ten = measure.timed(lambda: [run() for _ in range(10)], device)
        return min(ten().wall for _ in range(3)) / 10
    best, ends = float("inf"), clock() + 0.02
    while True:
        began = clock()
        run()
        now = clock()
        best = min(best, now - began)
        if now > ends:
            return best


def replay(calls: Counter[Call], device: str) -> dict[str, dict[str, float]]:
    """Calls, FLOPs and the sum of best seconds by kind of operator."""
    found = {kind: {"calls": 0, "flops": 0.0, "seconds": 0.0} for kind in (*KINDS, OTHER)}
    for (func, args, kwargs), count in calls.items():
        kind = kind_of_call((func, args, kwargs))
        given, named = [made(value) for value in args], dict(made(pair) for pair in kwargs)

        def run(func: Any = func, given: list[Any] = given, named: dict[str, Any] = named) -> None:
            func(*given, **named)

        try:
            with torch.no_grad():
                flops = measure.flops_of(run)
                seconds = best_seconds(run, device)
        except (RuntimeError, IndexError, ValueError):
            if kind != OTHER:
                raise
            continue  # an operator that random numbers do not suit
        found[kind]["calls"] += count
        found[kind]["flops"] += count * flops
        found[kind]["seconds"] += count * seconds
    return found


def large_product(dtype: torch.dtype, device: str) -> float:
    """FLOPs per second of a large matrix product."""
    side = LARGE if device == "cpu" else 4 * LARGE
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / best_seconds(lambda: left @ right, device)


def record_row(dtype: torch.dtype) -> Counter[Call]:
    """One row of SD1.5 at 512 px, forward as for the EMA and with its backward pass, on tensors without data."""
    from diffusers import UNet2DConditionModel

    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        torch.set_default_dtype(torch.float32)
        unet.requires_grad_(False)
        latents = torch.randn(1, 4, 64, 64, dtype=dtype)
        text = torch.randn(1, TEXT_LENGTH + 4, 768, dtype=dtype, requires_grad=True)
        with Recorder() as recorder:
            with torch.no_grad():
                unet(latents, 500, encoder_hidden_states=text)
            unet(latents, 500, encoder_hidden_states=text).sample.sum().backward()
    # What else is recorded here is also what tensors without data decompose operators into.
    return Counter({call: count for call, count in recorder.calls.items() if kind_of_call(call) != OTHER})


def make_sides(size: Size, device: str, dtype: str, agsm: dict[str, Any]) -> Sides:
    """Ours and the published loop; on a CPU, bfloat16 is for both."""
    options: dict[str, Any] = {"backbone": {}, "agsm": agsm, "pairs": {}, "half": dtype == "bfloat16"}
    sides = Sides(size, device, ROWS, PROMPTS, **options)
    if device == "cpu" and dtype == "bfloat16":
        parts = sides.published.pipeline
        for module in (sides.published.live.unet, sides.published.ema.unet, parts.vae, parts.text_encoder):
            module.to(torch.bfloat16)
    return sides


def summary(kinds: dict[str, dict[str, float]], peak: float) -> dict[str, Any]:
    """What the products need at best, and the rates."""
    products = [kinds[kind] for kind in KINDS]
    flops, seconds = (sum(kind[key] for kind in products) for key in ("flops", "seconds"))
    rounded = {kind: {key: float(f"{value:.5g}") for key, value in of.items()} for kind, of in kinds.items()}
    return {
        "large_product_flops_a_second": float(f"{peak:.5g}"),
        "ceiling_flops_a_second": float(f"{flops / seconds:.5g}"),
        "products_seconds": float(f"{seconds:.5g}"),
        "flops": flops,
        "kinds": rounded,
    }


def rates(found: dict[str, Any]) -> dict[str, Any]:
    """The rate of the step's products, at best, as a share of that of a large matrix product."""
    rate, large = found["ceiling_flops_a_second"], found["large_product_flops_a_second"]
    return measure.compare_amounts(rate, large, unit="FLOPs a second")


def against_the_step(found: dict[str, Any], sides: Sides, device: str, repeats: int) -> dict[str, dict[str, Any]]:
    """Our step's share of the ceiling, what could be reached, and how many cores are busy, as comparisons."""
    names = ("ours", "published")
    runs = {name: measure.timed(lambda name=name: sides.run(name), device) for name in names}
    taken = measure.interleave(runs, repeats=repeats, warmup=2)
    busy = {name: sum(run.cpu for run in taken[name]) / sum(run.wall for run in taken[name]) for name in names}
    if device == "cpu" and torch.get_num_threads() == 1:
        taken = {name: [measure.Seconds(run.cpu, run.cpu) for run in runs] for name, runs in taken.items()}
    step = measure.compare_seconds(taken["ours"], taken["published"])
    achieved, products = found["flops"] / step["ours"], found["products_seconds"]
    return {
        "": measure.compare_amounts(achieved, found["ceiling_flops_a_second"], unit="FLOPs a second"),
        ": reachable": measure.compare_amounts(products, step["other"], unit="s", of="other/ours"),
        ": step": step,
        ": cores busy": measure.compare_amounts(busy["ours"], busy["published"], unit="cores"),
    }


def main(
    size: Size = "embedded",
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Annotated[list[str], typer.Option(help=f"of {', '.join(DTYPES)}; several")] = ["float32"],  # noqa: B006
    threads: Annotated[list[int], typer.Option(help="on a CPU: thread counts to measure; default: torch's")] = [],  # noqa: B006
    agsm: Annotated[list[str], typer.Option(help="key=value for our objective")] = [],  # noqa: B006
    tag: Annotated[str, typer.Option(help="suffix of the result's name, for measurements with other options")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="steps of either side")] = 9,
    results: Path = measure.RESULTS,
) -> None:
    """Measure and record."""
    comparisons, figures = {}, {}
    row = size == "sd15" and device == "cpu"
    for name in dtype:
        if name not in DTYPES:
            raise typer.BadParameter(f"--dtype {name}: one of {', '.join(DTYPES)}")
        of_torch = getattr(torch, name)
        sides = None if row else make_sides(size, device, name, options_of(agsm))
        if sides is None:
            calls = record_row(of_torch)
        else:
            sides.run("ours")
            with Recorder() as recorder:
                sides.run("ours")
            calls = recorder.calls
        for count in (threads or [torch.get_num_threads()]) if device == "cpu" else [0]:
            if count:
                torch.set_num_threads(count)
            label = f"{name}, {count} thread{'s' * (count > 1)}" if count else name
            found = summary(replay(calls, device), large_product(of_torch, device))
            comparisons[f"{label}: shapes"] = rates(found)
            if sides is not None:
                compared = against_the_step(found, sides, device, repeats)
                comparisons |= {f"{label}{what}": comparison for what, comparison in compared.items()}
            figures[label] = found
            print(label, found, flush=True)
    measure.write_result(
        f"ceiling_{size}_{device}{tag}",
        what="one row of SD1.5 at 512 px, forward twice and backward once"
        if row
        else f"AGSM's step, {ROWS} images x {PROMPTS} prompts",
        device=device,
        results=results,
        comparisons=comparisons,
        figures=figures,
    )


if __name__ == "__main__":
    typer.run(main)
