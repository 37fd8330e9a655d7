"""From a model to the edits that retrofit it, each of them seen to be right on a copy. The model itself is not touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ..attention import SEAttention
from ..errors import RetrofitError
from ..plan import Edit
from .carry import apply_edits
from .check import Comparison, compare
from .copying import copied, on_cpu, on_meta
from .edits import named, ways
from .inputs import Inputs, candidate_inputs, given_inputs
from .isolation import isolated, without_collections
from .meta import MetaOperations
from .methods import forget_methods
from .operations import read
from .placement import Place, find_places
from .record import Record
from .recording import NeedsValues, record
from .splice import SpliceError
from .undo import strip

__all__ = ["Surgery", "SurgerySite", "plan_surgery", "record_of"]


@dataclass(eq=False)
class SurgerySite:
    """One SE module: where it will be, at which places it scales, and the edits by which it is called there.

    In a module that is called several times it has several places; where a forward has other code in training, several
    edits.
    """

    path: str
    places: list[Place]
    edits: list[Edit]

    @property
    def place(self) -> Place:
        return self.places[0]


@dataclass(eq=False)
class Surgery:
    """What is to be done to a model: the sites, and the blocks that are skipped, with the reasons."""

    inputs: Inputs
    record: Record
    sites: list[SurgerySite]
    skipped: dict[str, str]
    attended: int  # blocks that have channel attention already


Choose = Callable[[list[Place], dict[str, str]], list[Place]]


def plan_surgery(model: nn.Module, placement: str, example_inputs: Any, choose: Choose) -> Surgery:
    """Find out what is to be done to retrofit a model.

    Args:
        model: it is not touched.
        placement: one of ``PLACEMENTS``.
        example_inputs: see ``given_inputs``; None for inputs that the model may take.
        choose: which of the places that were found are wanted; the blocks of the others are put into the dict, with the
            reason.

    Raises:
        RetrofitError: the model can't be copied, or run on the inputs.
    """
    forget_methods()
    with isolated(model) as clean, _disable_current_modes(), without_collections():
        runs = _Runs.find(model, example_inputs, clean)
        found = find_places(read(runs.evaluation), placement)
        skipped = dict(found.skipped)
        places = choose(found.places, skipped)
        training = find_places(read(runs.training), placement).places if runs.training is not None else []
        sites = _Fitting(runs, places, training, skipped).run()
    return Surgery(runs.inputs, runs.evaluation, sites, skipped, found.attended)


def record_of(model: nn.Module, inputs: Inputs | None = None, *, without_se: bool = False) -> Record:
    """The record of a model in eval mode, or of the network that it was before its retrofit.

    Raises:
        RetrofitError: the model can't be copied, or run on the inputs.
    """
    with isolated(model) as clean, _disable_current_modes(), without_collections():
        if without_se:
            model = copied(model, on_meta if inputs is not None and inputs.is_meta else on_cpu, independent=True)
            strip(model)
        return read(_Runs.find(model, inputs, clean, evaluation_only=True).evaluation)


# Running a copy -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Runs:
    """The records of a model in eval and in train mode, and what it takes to make others like them."""

    model: nn.Module
    inputs: Inputs
    convert: Callable[[torch.Tensor], torch.Tensor]
    clean: Callable[[], None]
    evaluation: Record
    training: Record | None = None
    on_meta: MetaOperations = field(default_factory=MetaOperations)

    @classmethod
    def find(
        cls, model: nn.Module, example_inputs: Any, clean: Callable[[], None], evaluation_only: bool = False
    ) -> _Runs:
        """Record a model on the inputs given, or on the first that go through: on meta, or where the run asks for values,
        on a copy that has them. ``clean`` puts back what a run has left outside of the copy."""
        first_error: str | None = None
        copy = copied(model, on_meta, independent=True)
        given = example_inputs is not None
        candidates: Iterator[Inputs] = iter([given_inputs(example_inputs)]) if given else candidate_inputs(copy)
        for tried, inputs in enumerate(candidates):
            try:
                copy = copied(model, on_meta, independent=True) if tried == 1 else copy
                runs = cls._run(model, copy, inputs.on_meta(), inputs, on_meta, clean, evaluation_only)
            except NeedsValues:
                # one image of those that we made up is enough, and is as slow as it has to be
                values = (inputs if given else inputs.of_one()).with_values(torch.Generator().manual_seed(0))
                copy_with_values = copied(model, on_cpu, independent=True)
                runs = cls._run(model, copy_with_values, values, inputs, on_cpu, clean, evaluation_only)
            if runs.evaluation.broke_off is None:
                return runs
            first_error = first_error or runs.evaluation.broke_off
        name = type(model).__name__
        if first_error is None:
            raise RetrofitError(f"{name} has no convolution, so there is nothing to retrofit")
        if given:
            raise RetrofitError(
                f"{name} can't be run on the given example_inputs, of shape "
                f"{given_inputs(example_inputs).shapes}; give inputs that it takes. Its forward raised {first_error}"
            )
        raise RetrofitError(
            f"{name} can't be run on any input that was tried; give add_se(..., example_inputs=...) a tensor (or a tuple of "
            f"positional inputs, or a dict of keyword inputs) of the right shape. On the first one tried its forward raised {first_error}"
        )

    @classmethod
    def _run(
        cls, model: nn.Module, copy: nn.Module, inputs: Inputs, given: Inputs, convert: Any, clean: Callable[[], None],
        evaluation_only: bool,
    ) -> _Runs:  # fmt: skip
        clean()
        on_meta = MetaOperations()
        runs = cls(model, given, convert, clean, _evaluated(copy, inputs, on_meta), on_meta=on_meta)
        if not evaluation_only and runs.evaluation.broke_off is None:
            training = _trained(copy, inputs, on_meta)
            if training.broke_off is None:  # on these inputs it may not: a detector wants targets
                runs.training = training
        return runs

    def again(self, prepare: Callable[[nn.Module], None]) -> tuple[Record, Record | None]:
        """The same runs of a new copy that ``prepare`` has changed."""
        copy = copied(self.model, self.convert, independent=True)
        prepare(copy)
        self.clean()
        inputs = self.evaluation.inputs
        evaluation = _evaluated(copy, inputs, self.on_meta)
        return evaluation, None if self.training is None else _trained(copy, inputs, self.on_meta)


def _evaluated(copy: nn.Module, inputs: Inputs, on_meta: MetaOperations) -> Record:
    with torch.no_grad():
        return record(copy.eval(), inputs, on_meta)


def _trained(copy: nn.Module, inputs: Inputs, on_meta: MetaOperations) -> Record:
    with torch.enable_grad():
        return record(copy.train(), inputs, on_meta)


# Finding edits that are right -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Options:
    """The ways for one place that have not been found wrong, and the first thing that went wrong."""

    edits: list[Edit]
    problem: str = ""

    def fail(self, problem: str) -> None:
        """The way that was tried is wrong."""
        if self.edits:
            self.edits.pop(0)
            self.failed = self.failed or problem

    failed: str = ""

    @property
    def reason(self) -> str:
        return self.failed or self.problem

    @classmethod
    def of(cls, place: Place) -> _Options:
        options = cls([])
        for way in ways(place):
            if isinstance(way, SpliceError):
                options.problem = options.problem or str(way)
            elif way not in options.edits:
                options.edits.append(way)
        options.problem = (
            options.problem or "the value that SE should recalibrate appears in no code that can be changed"
        )
        return options


@dataclass(eq=False)
class _Fitting:
    """Tries edits on a copy until all that are left are right."""

    runs: _Runs
    places: list[Place]
    training: list[Place]
    skipped: dict[str, str]
    options: dict[Place, _Options] = field(default_factory=dict)
    extra: dict[Edit, list[Edit]] = field(default_factory=dict)  # for a site: the edits for training
    blamed: set[type] = field(default_factory=set)
    last_blamed: tuple[int, list[Place]] | None = None
    exactly: bool | None = None  # whether the original takes the same numbers in each run; None as long as no one asks

    def run(self) -> list[SurgerySite]:
        self.options = {place: _Options.of(place) for place in self.places}
        while True:
            sites = self.sites()
            if not sites:
                return []
            paths = {site.path: site for site in sites}
            try:
                evaluation, training = self.runs.again(partial(self.edit, sites=sites))
            except SpliceError as error:
                self.drop_class(sites, str(error))
                continue
            if self.breaks(evaluation, paths) or (training is not None and self.breaks(training, paths)):
                continue
            expected = {site.path: site.places for site in sites}
            compared = self.compare(self.runs.evaluation, evaluation, expected)
            if self.right(compared, paths, self.runs.evaluation, evaluation) and self.right_in_training(
                training, paths
            ):
                return sites

    def sites(self) -> list[SurgerySite]:
        """The sites by the best way that is left for each place."""
        by_edit: dict[Edit, list[Place]] = {}
        for place in list(self.places):
            if not self.options[place].edits:
                self.drop(place, self.options[place].reason)
                continue
            by_edit.setdefault(self.options[place].edits[0], []).append(place)
        for edit, places in list(by_edit.items()):
            if len({(p.channels, p.op.channel_dim) for p in places}) > 1:
                for p in places:
                    self.drop(p, "it is called several times, with other channels each time")
                del by_edit[edit]
        paths = named({edit: places[0].block for edit, places in by_edit.items()}, self.runs.evaluation.model)
        return [SurgerySite(paths[edit], places, [edit, *self.extra.get(edit, [])]) for edit, places in by_edit.items()]

    def edit(self, copy: nn.Module, sites: list[SurgerySite]) -> None:
        modules = {}
        for site in sites:
            se = _trial(site.place.channels, site.place)
            if self.runs.convert is on_cpu:
                se.to_empty(device="cpu").init_weights(torch.Generator())
            for edit in site.edits:
                modules[edit] = (site.path, se)
        apply_edits(copy, modules)

    # What a comparison says

    def compare(self, before: Record, after: Record, expected: Mapping[str, list[Place]]) -> Comparison:
        compared = compare(before, after, expected, exactly=self.exactly is not False)
        if compared.difference is None or self.exactly is not None:
            return compared
        loosely = compare(before, after, expected, exactly=False)
        if loosely.difference is not None:
            return compared
        evaluation, training = self.runs.again(lambda copy: None)  # the time of day, say
        repeated = [(self.runs.evaluation, evaluation)]
        if self.runs.training is not None and training is not None:
            repeated.append((self.runs.training, training))
        self.exactly = all(compare(first, second, {}).difference is None for first, second in repeated)
        return compared if self.exactly else loosely

    def breaks(self, after: Record, paths: Mapping[str, SurgerySite]) -> bool:
        """Whether an SE module was given something that it can't scale; then the way to it is wrong."""
        if after.broke_off is None or after.broke_in is None or after.broke_in not in paths:
            return False
        for place in paths[after.broke_in].places:
            self.options[place].fail("the value that SE should recalibrate is not the result of one expression")
        return True

    def right(self, compared: Comparison, paths: Mapping[str, SurgerySite], before: Record, after: Record) -> bool:
        if compared.difference is not None:
            self.blame(compared.difference, before, list(paths.values()), after.broke_off)
            return False
        for path, problem in compared.wrong.items():
            for place in paths[path].places:
                self.options[place].fail(problem)
        return not compared.wrong

    def right_in_training(self, after: Record | None, paths: Mapping[str, SurgerySite]) -> bool:
        before = self.runs.training
        if before is None or after is None:
            return True
        expected = {path: self.in_training(site) for path, site in paths.items()}
        compared = self.compare(before, after, {path: places or [] for path, places in expected.items()})
        if compared.difference is not None:
            self.blame(compared.difference, before, list(paths.values()), after.broke_off)
            return False
        right = True
        for path, problem in compared.wrong.items():
            site, places = paths[path], expected[path]
            if places is None or path in compared.called:
                continue  # stochastic depth, say, hides the block or its end; it is the expression that was right in eval mode
            further = [e for p in places for e in _Options.of(p).edits if e.holder == site.edits[0].holder]
            further = [e for e in further if e.form == "splice" and e not in site.edits]
            if further and site.edits[0] not in self.extra:
                self.extra[site.edits[0]] = further[:1]
            else:
                for place in site.places:
                    self.options[place].fail(f"in training, {problem}")
            right = False
        return right

    def in_training(self, site: SurgerySite) -> list[Place] | None:
        """The places of a site in the record of training; None if there is no block of its kind there."""
        same = [p for p in self.training if (p.block, p.kind) == (site.place.block, site.place.kind)]
        own = [p for p in self.places if (p.block, p.kind) == (site.place.block, site.place.kind)]
        if len(same) != len(own):
            return None
        return [twin for place, twin in zip(own, same, strict=True) if place in site.places]

    def blame(self, index: int, before: Record, sites: list[SurgerySite], broke_off: str | None) -> None:
        """Leave out the block at which the retrofitted network did something else; at its second block, all of its class.
        Where its code raised an error, try another way first."""
        again = self.last_blamed is not None and self.last_blamed[0] == index
        if self.last_blamed is not None and again:  # it was not that block: the next one, then
            for place in self.last_blamed[1]:
                self.places.append(place)
                del self.skipped[place.block]
        places = sorted(((s, p) for s in sites for p in s.places), key=lambda pair: pair[1].op.index)
        around = [p for p in places if p[1].call.path and p[1].call.start <= index < p[1].call.end]
        earlier = [p for p in places if p[1].op.index < index]
        later = [p for p in places if p[1].op.index >= index]
        if around and not again:
            site = max(around, key=lambda p: p[1].call.start)[0]
        elif earlier and (not again or not later):
            site = earlier[-1][0]
        else:
            site = (later or places)[0][0]
        if broke_off is not None and not again and all(len(self.options[p].edits) > 1 for p in site.places):
            for place in site.places:
                self.options[place].fail(f"with SE in it, the network can't be run: {broke_off}")
            return
        self.last_blamed = (index, list(site.places)) if not again else None
        reason = (
            "with SE in it, the network does something else than before: it looks at the class of the block, its "
            "children or its parameters"
            if broke_off is None
            else f"with SE in it, the network can't be run: {broke_off}"
        )
        cls = self.class_of(site)
        for other in sites if cls in self.blamed else [site]:
            if other is site or self.class_of(other) is cls:
                for place in other.places:
                    self.drop(place, reason)
        self.blamed.add(cls)

    def drop_class(self, sites: list[SurgerySite], problem: str) -> None:
        """Leave out the sites whose class can't be derived: of the first class for which that is so."""
        modules = dict(self.runs.evaluation.model.named_modules())
        for site in sites:
            trial = copied(modules[site.edits[0].holder], on_meta, independent=True)
            se = _trial(2, site.place)
            alone = {replace(e, holder=""): (site.path.rpartition(".")[2], se) for e in site.edits if e.form != "graph"}
            try:
                apply_edits(trial, alone)
            except SpliceError as error:
                for place in site.places:
                    self.options[place].fail(str(error))
        if all(self.options[p].edits and self.options[p].edits[0] == s.edits[0] for s in sites for p in s.places):
            for site in sites:  # none of them alone: their insertions do not go together
                for place in site.places:
                    self.drop(place, problem)

    def class_of(self, site: SurgerySite) -> type:
        return type(site.place.call.module)

    def drop(self, place: Place, reason: str) -> None:
        if place in self.places:
            self.places.remove(place)
            self.skipped[place.block] = reason


def _trial(channels: int, place: Place) -> SEAttention:
    """An SE module to be run on a copy."""
    se = SEAttention(
        channels, channels, gate="identity", channel_dim=place.op.channel_dim or 1, dtype=place.op.dtype, device="meta"
    )
    return se.requires_grad_(False)
