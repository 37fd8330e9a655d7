"""Does the surgery keep the function? Ways of putting SE into networks of both zoos and into people's own, compared:
``python -m benchmarks.peers``.

Each network's outcome is kept in ``peers.jsonl``, so the command can be stopped and started again; then docs/peers.md is written.
"""

from __future__ import annotations

import argparse
import copy
import io
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from se_retrofit import plan_se
from se_retrofit.errors import RetrofitError
from tools.zoo import entries, read_rows, smallest
from tools.zoo.check import CONVERTED

from .evidence.page import fill, table
from .evidence.results import Results
from .peers_networks import OWN
from .peers_ways import LANDING, SE_CLASSES, WAYS

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "peers.md"
ZOO = 60
COMPILED = 500_000  # parameters up to which compiling and exporting are tried; it takes seconds each
NATIVE = {  # of timm's networks without SE, their siblings whose authors wrote it into the source
    "resnet18": "seresnet18", "resnet50": "seresnet50", "resnext50_32x4d": "seresnext50_32x4d", "resnext26ts": "seresnext26ts",
    "resnet33ts": "seresnet33ts", "darknet21": "sedarknet21", "cs3darknet_l": "cs3sedarknet_l", "regnetx_002": "regnety_002",
    "vovnet39a": "ese_vovnet39b",
}  # fmt: skip


# What is looked at

PROMISES = ("converted", "outputs", "keys", "classes", "pickle", "compile", "export")


def values(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        found = model(*inputs)
    leaves = tree_leaves(vars(found) if hasattr(found, "__dataclass_fields__") else found)
    return [value for value in leaves if isinstance(value, Tensor)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def holds(check: Callable[[], bool]) -> bool:
    """Whether a check passes; one that raises does not."""
    try:
        return check()
    except Exception:
        return False


def outcome(build: Callable[[], tuple[nn.Module, tuple[Any, ...]]], way: str) -> dict[str, Any]:
    """What a way keeps of a network, by promise: True or False, None where it was not tried, or where the network itself does not
    do it."""
    model, inputs = build()
    model = randomised(model).eval()
    try:
        blocks = list(dict.fromkeys(site.block for site in plan_se(model, example_inputs=inputs).sites))
    except RetrofitError:
        blocks = []
    given = copy.deepcopy(model)
    wanted = values(given, inputs)
    classes = {path: type(module) for path, module in given.named_modules()}
    keys = given.state_dict()
    found: dict[str, Any] = dict.fromkeys(PROMISES)
    try:
        made = WAYS[way](given, inputs, blocks)
        outputs = values(made, inputs)
        found["converted"] = any(isinstance(module, SE_CLASSES) for module in made.modules())
    except Exception as error:
        return {**found, "converted": False, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]}
    if not found["converted"]:
        return found
    made.eval()
    found["outputs"] = same(outputs, wanted)
    state = made.state_dict()
    found["keys"] = all(key in state and torch.equal(state[key], value) for key, value in keys.items())
    now = dict(made.named_modules())
    found["classes"] = all(path in now and isinstance(now[path], each) for path, each in classes.items())
    checks: dict[str, Callable[[nn.Module], bool]] = {
        "pickle": lambda m: same(values(pickled(m), inputs), values(m, inputs))
    }
    if sum(p.numel() for p in model.parameters()) <= COMPILED:
        checks |= {"compile": partial(compiles, inputs=inputs), "export": partial(exports, inputs=inputs)}
    for name, check in checks.items():
        if holds(lambda check=check: check(model)):  # type: ignore[misc]
            found[name] = holds(lambda check=check: check(made))  # type: ignore[misc]
    return found


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def compiles(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """In one graph, which the backend runs as it is."""
    torch._dynamo.reset()
    return same(values(torch.compile(model, backend="eager", fullgraph=True), inputs), values(model, inputs))  # type: ignore[arg-type]


def exports(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    return same(values(torch.export.export(model, inputs).module(), inputs), values(model, inputs))


def randomised(model: nn.Module) -> nn.Module:
    """With norms that are no identity, and no branch at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if value.dim() == 1 and value.is_floating_point():
                    low = 0.5 if name in ("weight", "running_var", "gamma") else -0.2
                    value.copy_(low + torch.rand(value.shape, generator=generator) * (1.0 if low > 0 else 0.4))
    return model


# Where SE lands, against the networks whose authors wrote it into the source


class Listening(nn.Module):
    """In the place of a native SE: an identity."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def landed(base: str, native: str, way: str) -> dict[str, Any]:
    """How many SE modules of the native network get a value that one of the way's gets too, with the same weights; and how many
    each has."""
    reference = randomised(timm.create_model(native)).eval()
    for path, module in list(reference.named_modules()):
        if type(module).__name__ in ("SEModule", "EffectiveSEModule"):
            reference.set_submodule(path, Listening())
    state = reference.state_dict()
    model = timm.create_model(base).eval()
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    inputs = (torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),)
    blocks = list(dict.fromkeys(site.block for site in plan_se(model, example_inputs=inputs).sites))
    wanted = heard(reference, (Listening,), inputs)
    try:
        found = heard(LANDING[way](model, inputs, blocks), SE_CLASSES, inputs)
    except Exception as error:
        return {"native": len(wanted), "own": 0, "both": 0, "error": f"{type(error).__name__}: {error}"[:200]}
    both = sum(any(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for b in found) for a in wanted)
    return {"native": len(wanted), "own": len(found), "both": both}


def heard(model: nn.Module, classes: tuple[type, ...], inputs: tuple[Any, ...]) -> list[Tensor]:
    """What the modules of these classes are given, while they give it back."""
    given: list[Tensor] = []

    def listen(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        given.append(args[0].clone())
        return args[0]

    hooks = [m.register_forward_hook(listen) for m in model.modules() if isinstance(m, classes)]
    values(model.eval(), inputs)
    for hook in hooks:
        hook.remove()
    return given


# All of it


def zoo_networks() -> dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]]:
    """The smallest converted network of each family of both zoos, the small ones first, that takes one picture."""
    rows = [row for row in read_rows(PAGE.with_name("zoo.csv")) if row.verdict == CONVERTED and "." not in row.family]
    chosen = sorted(
        smallest(rows, lambda row: (row.name.partition("/")[0], row.family)), key=lambda row: row.parameters
    )
    by_name = {entry.name: entry for entry in entries()}
    names = [row.name for row in chosen if row.name in by_name and "quantized" not in row.name]

    def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
        torch.manual_seed(0)
        model = by_name[name].build("cpu").eval()
        return model, (picture_for(model),)

    return {name: partial(build, name) for name in names}


def picture_for(model: nn.Module) -> Tensor:
    """The smallest picture that a network takes."""
    for shape in (
        (1, 3, 64, 64),
        (1, 3, 128, 128),
        (1, 3, 224, 224),
        (1, 3, 240, 240),
        (1, 3, 256, 256),
        (1, 3, 16, 64, 64),
    ):
        picture = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if holds(lambda picture=picture: bool(values(model, (picture,)))):  # type: ignore[misc]
            return picture
    raise RetrofitError(f"{type(model).__name__} takes no picture of 64 to 256 pixels")


def steps(results: Results) -> Iterator[Callable[[], None]]:
    """What is missing, each to be called."""
    for kind, networks, most in (("own", OWN, len(OWN)), ("zoo", zoo_networks(), ZOO)):
        for name, build in list(networks.items())[:most]:
            for way in WAYS:
                run = {"study": "peers", "kind": kind, "network": name, "way": way}
                if run not in results:
                    yield lambda run=run, build=build, way=way: results.add(run, outcome(build, way))  # type: ignore[misc]
    for base, native in NATIVE.items():
        for way in LANDING:
            run = {"study": "landed", "network": native, "way": way}
            if run not in results:
                yield lambda run=run, pair=(base, native), way=way: results.add(run, landed(*pair, way))  # type: ignore[misc]


def write_page(page: Path, results: Results) -> None:
    """The tables of the page."""
    rows = [(row["run"], row["outcome"]) for row in results.done.values()]
    parts = {kind: partial(_kept, [r for r in rows if r[0].get("kind") == kind]) for kind in ("zoo", "own")}
    parts["landed"] = partial(_landed, [r for r in rows if r[0]["study"] == "landed"])
    fill(page, parts)


def _kept(rows: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    lines = []
    for way in WAYS:
        found = [what for run, what in rows if run["way"] == way]
        cells = []
        for promise in PROMISES:
            tried = [what[promise] for what in found if what[promise] is not None]
            cells.append(f"{sum(tried)} of {len(tried)}" if tried else "")
        lines.append([way, *cells])
    heads = ("converted", "outputs equal", "keys kept", "classes kept", "pickle", "compile", "export")
    return table(["way", *heads], lines)


def _landed(rows: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    lines = []
    for native in NATIVE.values():
        cells = {run["way"]: what for run, what in rows if run["network"] == native}
        if cells:
            shown = [f"{cells[way]['both']} ({cells[way]['own']})" for way in LANDING]
            lines.append([native, str(next(iter(cells.values()))["native"]), *shown])
    return table(["network", "its SE", *LANDING], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "peers.jsonl")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--only-page", action="store_true", help="run nothing")
    options = parser.parse_args()
    results = Results(options.results)
    if not options.only_page:
        warnings.simplefilter("ignore")
        for step in track(list(steps(results)), "networks x ways"):
            step()
    write_page(options.page, results)


if __name__ == "__main__":
    main()
