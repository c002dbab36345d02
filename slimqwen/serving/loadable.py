"""Prediction of the engines in which a cut will load, from its config alone: as `slimqwen check` would find afterwards."""

from collections.abc import Iterable, Iterator, Mapping

from pydantic import BaseModel, ConfigDict

from slimqwen.families import Config, Family
from slimqwen.families.family import Layout
from slimqwen.serving.engines import ENGINES
from slimqwen.serving.requirements import PlannedCheckpoint, check_loader, size_caveats


class Refusal(BaseModel):
    """An engine whose loader would not accept the cut. `new`: it accepts the model before the cut."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: str
    version: str
    problems: list[str]
    new: bool


class Loadable(BaseModel):
    """The prospects of serving a cut, by the tables of `serving.engines`.

    refusals: the engines that would not load it. caveats: uses that its sizes, unlike the source's, rule out or make slow.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    refusals: list[Refusal]
    caveats: list[str]


def loadable(
    family: Family, source: Config, cut: Config, layouts: Mapping[str, Layout] | None = None, *, layers: list[int]
) -> Loadable:
    """Compare a cut with the requirements of each engine's loader. No weights, no torch.

    Args:
        layouts: of the experts of the source's blocks on disk; None: as in the family's releases.
        layers: of the source, that are kept.
    """
    after = PlannedCheckpoint.of(family, cut, layouts_of_cut(family, source, cut, layouts, layers))
    refusing = [(engine, found) for engine in ENGINES.values() if (found := check_loader(engine, after)).problems]
    before = PlannedCheckpoint.of(family, source, layouts) if refusing else None
    refusals = [
        Refusal(
            engine=engine.name,
            version=engine.version,
            problems=found.problems,
            new=before is not None and not check_loader(engine, before).problems,
        )
        for engine, found in refusing
    ]
    known = size_caveats(family, source)
    return Loadable(refusals=refusals, caveats=[caveat for caveat in size_caveats(family, cut) if caveat not in known])


def layouts_of_cut(
    family: Family, source: Config, cut: Config, layouts: Mapping[str, Layout] | None, layers: list[int]
) -> dict[str, Layout] | None:
    """Return the layout of each block of the cut, that of the block it comes from, which `prune` keeps."""
    if layouts is None:
        return None
    sources = family.sources(source, cut, layers)
    return {name: layouts[block.name] for name, block in sources.items() if block.experts}


def refusals_in_words(refusals: Iterable[Refusal]) -> Iterator[str]:
    """Yield lines such as `does not load in sglang 0.5.23: it requires ...`."""
    for refusal in refusals:
        also = "" if refusal.new else " (nor does the model before)"
        yield f"does not load in {refusal.engine} {refusal.version}{also}: {'; '.join(refusal.problems)}"


def describe(serving: Loadable) -> Iterator[str]:
    """Yield the lines of `slimqwen plan` about serving the cut."""
    refused = {refusal.engine for refusal in serving.refusals}
    loading = [f"{engine.name} {engine.version}" for engine in ENGINES.values() if engine.name not in refused]
    yield f"loads in {', '.join(loading)}" if loading else "loads in no engine whose loader is known"
    yield from refusals_in_words(serving.refusals)
    yield from serving.caveats
