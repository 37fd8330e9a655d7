"""Finding correct edits: each is carried out on a copy, whose record must be the original's plus SE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from ...attention import Inserted, StaticFactor
from ...plan import Edit
from ..blocks.block import Place
from ..record.copying import mode_of
from ..record.graph import Record
from ..record.runs import Runs
from .carry import apply_edits, problems_of
from .check import NOT_ONE_VALUE, Findings, compare_records
from .source import SpliceError
from .ways import named, ways

IN_NO_CODE = "the value that SE should recalibrate appears in no code that can be changed"
ONE_FOR_SEVERAL = "one expression of a loop computes it and other blocks, so it can't get SE of its own"
LOOKS_INSIDE = (
    "with SE in it, the network does something else than before: it looks at the class of the block, its children or its "
    "parameters, differentiates it, or takes other numbers in each run"
)


@dataclass(eq=False)
class SurgerySite:
    """An SE module: its path, the places at which it scales, and the edits that call it there.

    In a block that is called several times, it has several places; if a forward has other code in training, several
    edits.
    """

    path: str
    places: list[Place]
    edits: list[Edit]

    @property
    def place(self) -> Place:
        return self.places[0]


@dataclass(eq=False)
class _Options:
    """The edits for one place that have not been found wrong, and why there are no others."""

    edits: list[Edit]
    impossible: str
    failure: str = ""  # of the first that was found wrong

    @classmethod
    def of(cls, place: Place) -> _Options:
        found = list(ways(place))
        problems = [str(way) for way in found if isinstance(way, SpliceError)] or [IN_NO_CODE]
        return cls(list(dict.fromkeys(way for way in found if isinstance(way, Edit))), problems[0])

    def fail(self, edit: Edit, problem: str) -> None:
        self.failure = self.failure or problem
        self.edits.remove(edit)


@dataclass(eq=False)
class Fitting:
    """Tries edits on copies until all that remain are correct.

    Args:
        runs: the records of the original.
        places: the places for SE, in the record of eval mode.
        training: the places that were found in the record of train mode.
        skipped: receives the blocks that are left out, with the reasons.
    """

    runs: Runs
    places: list[Place]
    training: list[Place]
    skipped: dict[str, str]
    options: dict[Place, _Options] = field(default_factory=dict)
    extra: dict[Edit, list[Edit]] = field(default_factory=dict)  # additional edits of a site, for training
    deferred: set[Edit] = field(default_factory=set)  # edits to try last, without their holders

    def sites(self) -> list[SurgerySite]:
        """Return the sites for all places that can have SE."""
        self.options = {place: _Options.of(place) for place in self.places}
        searched = False
        while sites := self.best():
            outcome = self.trial(sites)
            if outcome.different:
                self.leave_out(self.guilty(sites) or sites[-1:], outcome)
            elif outcome.wrong:
                self.fail(sites, outcome.wrong)
                if outcome.broke_off is not None:
                    self.defer(next(site.edits[0] for site in sites if site.path in outcome.wrong))
                if not searched:  # try all remaining edits for these places at once, rather than one after the other
                    self.search({place for site in sites if site.path in outcome.wrong for place in site.places})
                    searched = True
            elif outcome.right:
                return sites
        return []

    # Choosing edits

    def best(self) -> list[SurgerySite]:
        """Return the sites with the best remaining edit for each place; none of these is known to be wrong alone."""
        while True:
            by_edit: dict[Edit, list[Place]] = {}
            waiting = list(self.places)
            for place in waiting:
                options = self.options[place]
                if options.edits:
                    by_edit.setdefault(options.edits[0], []).append(place)
                else:
                    waiting += self.drop(place, options.failure or options.impossible)
            sites = self.named(by_edit)
            wrong = {site.path: ONE_FOR_SEVERAL for site in sites if not _one_block(site.places)}
            if not wrong:
                return sites
            self.fail(sites, wrong)

    def named(self, by_edit: Mapping[Edit, list[Place]]) -> list[SurgerySite]:
        paths = named({edit: places[0].block for edit, places in by_edit.items()}, self.runs.evaluation.model)
        return [SurgerySite(paths[edit], places, [edit, *self.extra.get(edit, ())]) for edit, places in by_edit.items()]

    def fail(self, sites: Iterable[SurgerySite], wrong: Mapping[str, str]) -> None:
        for site in sites:
            for place in site.places if site.path in wrong else ():
                self.options[place].fail(site.edits[0], wrong[site.path])

    def defer(self, edit: Edit) -> None:
        """Try an edit last at all other places once it has broken off the run at one: the same code will most likely fail
        there as well, and each run shows only one failure."""
        code = replace(edit, holder="")
        if not edit.digest or code in self.deferred:
            return
        self.deferred.add(code)
        for options in self.options.values():
            same = [way for way in options.edits if replace(way, holder="") == code]
            options.edits.sort(key=same.__contains__)

    def search(self, places: set[Place]) -> None:
        """Try all remaining edits for some places in one run, and drop those that are wrong."""
        by_edit: dict[Edit, list[Place]] = {}
        for place in places:
            for edit in self.options[place].edits:
                by_edit.setdefault(edit, []).append(place)
        sites = self.named(by_edit)
        outcome = self.trial(sites, training=False)
        if not outcome.different:
            self.fail(sites, outcome.wrong)

    def drop(self, place: Place, reason: str) -> list[Place]:
        """Leave a block out; or, if a function in a loop computes its value, return the place before that, which may be
        the output of a separate module (``F.relu(norm(conv(x)))``, ``conv(x)[:, :8]``)."""
        self.places.remove(place)
        op = place.op
        computed = op.role in ("act", "pass", "affine", "pool", "part") and op.module is None and len(op.data) == 1
        if reason == ONE_FOR_SEVERAL and computed and op.data[0].channels is not None and place.call.shows(op.data[0]):
            instead = replace(place, op=op.data[0])
            self.places.append(instead)
            self.options[instead] = _Options.of(instead)
            return [instead]
        self.skipped[place.block] = reason
        return []

    # Trials

    def trial(self, sites: list[SurgerySite], training: bool = True) -> Findings:
        """Carry out edits on a copy and compare its record with the original's."""
        by_path = {site.path: site for site in sites}
        try:
            evaluation, trained = self.runs.again(partial(self.edit, sites=sites), training=training)
        except SpliceError as error:
            edits = {edit: site.path for site in sites for edit in site.edits}
            problems = problems_of(self.runs.evaluation.model, edits) or dict.fromkeys(edits, str(error))
            return Findings({site.path: problems[e] for site in sites for e in site.edits if e in problems})
        for record in (evaluation, trained):
            if record is not None and record.broke_off is not None and record.broke_in in by_path:
                wrong = {record.broke_in: NOT_ONE_VALUE}  # SE was given something that it can't scale
                return Findings(wrong, broke_off=record.broke_off)
        compared = compare_records(self.runs.evaluation, evaluation, {path: s.places for path, s in by_path.items()})
        if not compared.right or trained is None:
            return compared
        return self.trained(by_path, trained)

    def trained(self, by_path: Mapping[str, SurgerySite], after: Record) -> Findings:
        """Return the findings from the record of train mode."""
        assert self.runs.training is not None
        expected = {path: self.in_training(site) for path, site in by_path.items()}
        compared = compare_records(self.runs.training, after, {path: places or [] for path, places in expected.items()})
        wrong, extended = {}, False
        for path, problem in compared.wrong.items():
            places = expected[path]
            if places is None or path in compared.called:
                continue  # hidden by stochastic depth, say; the expression was correct in eval mode
            if self.extend(by_path[path], places):
                extended = True
            else:
                wrong[path] = f"in training, {problem}"
        return replace(compared, wrong=wrong, again=extended)

    def edit(self, copy: nn.Module, sites: list[SurgerySite]) -> None:
        """Insert factors, whatever the attention will be: a product with a parameter reveals values that can't be
        scaled, and networks that inspect their parameters."""
        like = self.runs.evaluation.inputs.tensors[0]
        modules: dict[Edit, tuple[str, Inserted]] = {}
        for site in sites:
            op, channels = site.place.op, site.place.channels
            with mode_of(like):
                factor = StaticFactor(channels, channel_dim=op.channel_dim, dtype=op.dtype, device=like.device)
            modules.update(dict.fromkeys(site.edits, (site.path, factor.requires_grad_(False))))
        apply_edits(copy, modules)

    # In training

    def in_training(self, site: SurgerySite) -> list[Place] | None:
        """Return the places of a site in the record of train mode; None if there is no block of its kind there."""
        like = (site.place.block, site.place.kind, site.place.aside)
        same = [p for p in self.training if (p.block, p.kind, p.aside) == like]
        own = [p for p in self.places if (p.block, p.kind, p.aside) == like]
        if len(same) != len(own):
            return None
        return [twin for place, twin in zip(own, same, strict=True) if place in site.places]

    def extend(self, site: SurgerySite, places: Sequence[Place]) -> bool:
        """Give a site an additional edit if the forward has other code in training."""
        holder = site.edits[0].holder
        own = (e for p in places for e in _Options.of(p).edits if e.form == "splice" and e.holder == holder)
        further = [e for e in own if e not in site.edits]
        if not further or site.edits[0] in self.extra:
            return False
        self.extra[site.edits[0]] = further[:1]
        return True

    # Blame

    def guilty(self, sites: list[SurgerySite]) -> list[SurgerySite]:
        """Return the sites with which the network does something else, found by bisection: first the classes of their
        blocks, then one or two sites of each such class; if two are found, the whole class."""
        by_class: dict[type, list[SurgerySite]] = {}
        for site in sites:
            by_class.setdefault(type(site.place.call.module), []).append(site)
        found = []
        for group in self.halve(list(by_class.values())):
            alone = [one for (one,) in self.halve([[site] for site in group], most=2)]
            found += group if len(alone) != 1 else alone
        return found

    def halve(self, groups: list[list[SurgerySite]], most: int = 1_000_000) -> list[list[SurgerySite]]:
        """Return at most ``most`` of the groups of sites that make a difference on their own."""
        if not groups or not self.trial([site for group in groups for site in group]).different:
            return []
        if len(groups) == 1:
            return groups
        middle = len(groups) // 2
        first = self.halve(groups[:middle], most)
        return first + (self.halve(groups[middle:], most - len(first)) if len(first) < most else [])

    def leave_out(self, sites: list[SurgerySite], outcome: Findings) -> None:
        """Leave out the blocks of sites; if their code raised an error, try another edit first."""
        for site in sites:
            broke = f"with SE in it, the network can't be run: {outcome.broke_off}"
            if outcome.broke_off is not None and all(len(self.options[p].edits) > 1 for p in site.places):
                self.fail([site], {site.path: broke})
                continue
            for place in site.places:
                self.drop(place, LOOKS_INSIDE if outcome.broke_off is None else broke)


def _one_block(places: list[Place]) -> bool:
    """Return whether the places that one edit reaches are the same block, computed again by the same modules."""
    one = max((place.layers for place in places), key=len)
    return all(place.layers <= one for place in places) and len({(p.channels, p.op.channel_dim) for p in places}) == 1
