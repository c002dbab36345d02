"""Where a cut will load, told before it is made: what `slimqwen check` would find of it, from its config."""

from collections.abc import Iterable, Iterator, Mapping

from pydantic import BaseModel, ConfigDict

from slimqwen.families import Config, Family
from slimqwen.families.family import Layout
from slimqwen.serving.engines import ENGINES
from slimqwen.serving.requirements import Unwritten, size_caveats, verdict


class Refusal(BaseModel):
    """An engine whose loader would not take the cut. `new`: it takes the model that is cut."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: str
    version: str
    problems: list[str]
    new: bool


class Loadable(BaseModel):
    """What is known of serving a cut, by the tables of `checkpoint.engines`.

    refusals: the engines that would not load it. caveats: what its sizes rule out or make slow and the source's do not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    refusals: list[Refusal]
    caveats: list[str]


def loadable(
    family: Family, source: Config, cut: Config, layouts: Mapping[str, Layout] | None = None, *, layers: list[int]
) -> Loadable:
    """Compare a cut with what each engine's loader takes. No weights, no torch.

    Args:
        layouts: how the experts of the source's blocks lie on disk; None: as the family's releases have them.
        layers: of the source, that stay.
    """
    after = Unwritten.of(family, cut, layouts_of_cut(family, source, cut, layouts, layers))
    refusing = [(engine, found) for engine in ENGINES.values() if (found := verdict(engine, after)).problems]
    before = Unwritten.of(family, source, layouts) if refusing else None
    refusals = [
        Refusal(
            engine=engine.name,
            version=engine.version,
            problems=found.problems,
            new=before is not None and not verdict(engine, before).problems,
        )
        for engine, found in refusing
    ]
    known = size_caveats(family, source)
    return Loadable(refusals=refusals, caveats=[caveat for caveat in size_caveats(family, cut) if caveat not in known])


def layouts_of_cut(
    family: Family, source: Config, cut: Config, layouts: Mapping[str, Layout] | None, layers: list[int]
) -> dict[str, Layout] | None:
    """Each block of the cut as the block that it comes from, which is how `prune` writes it."""
    if layouts is None:
        return None
    sources = family.sources(source, cut, layers)
    return {name: layouts[block.name] for name, block in sources.items() if block.experts}


def refusals_in_words(refusals: Iterable[Refusal]) -> Iterator[str]:
    """`does not load in sglang 0.5.23: it wants ...`"""
    for refusal in refusals:
        also = "" if refusal.new else " (nor does the model before)"
        yield f"does not load in {refusal.engine} {refusal.version}{also}: {'; '.join(refusal.problems)}"


def in_words(serving: Loadable) -> Iterator[str]:
    """What `slimqwen plan` says of serving the cut, a line each."""
    refused = {refusal.engine for refusal in serving.refusals}
    taken = [f"{engine.name} {engine.version}" for engine in ENGINES.values() if engine.name not in refused]
    yield f"loads in {', '.join(taken)}" if taken else "loads in no engine whose loader is known"
    yield from refusals_in_words(serving.refusals)
    yield from serving.caveats
