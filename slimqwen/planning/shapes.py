"""Targets and configs: which sizes can be cut, and the config.json of what remains."""

from slimqwen.families import Config, Family
from slimqwen.planning.progressive import check_target
from slimqwen.recipe import Target


def shape_of(config: Config) -> Target:
    """The four sizes that can be cut, of a model as it is."""
    return Target(**{field: config[field] for field in Target.model_fields})


def completed(target: Target, config: Config) -> Target:
    """`target` with the source's value where it says nothing. Raises UserError where it asks for more than there is."""
    source = shape_of(config)
    full = source.model_copy(update=target.model_dump(exclude_none=True))
    check_target(source, full)
    return full


def target_config(family: Family, config: Config, target: Target, layers: list[int] | None = None) -> Config:
    """The config.json of `config` cut to a complete target; the first layers are kept where none are named."""
    sizes = family.sizes(config)
    sizes[family.hidden] = size_of(target.hidden_size)
    sizes[family.expert] = size_of(target.num_experts)
    layers = list(range(size_of(target.num_hidden_layers))) if layers is None else layers
    return family.resized(config, sizes, layers, size_of(target.num_experts_per_tok))


def size_of(value: int | None) -> int:
    """A size of a completed target."""
    assert value is not None, "the target must be completed first"
    return value
