"""The criteria that a recipe chooses from: their names, and the words in which help, plan and report print them.

A name is a plain string in YAML, in JSON and on the command line. What it does is one function, which is registered by the
name: `planning/depth.py`, `planning/importance.py` and `planning/experts.py` hold the criteria's, `losses/divergence.py` the
divergences'.
"""

from enum import StrEnum


class Criterion(StrEnum):
    """A name in a recipe with its words.

    label: what it goes by in a sentence, such as "mean gate weight".
    description: what it does, for the field's description in the help.
    """

    def __new__(cls, value: str, *words: str) -> "Criterion":
        """Return the member of this name."""
        member = str.__new__(cls, value)
        member._value_ = value
        return member

    def __init__(self, value: str, label: str, description: str) -> None:
        self.label = label
        self.description = description

    @property
    def in_words(self) -> str:
        """The label with the name behind it: "mean gate weight ('soft_logits')"."""
        return f"{self.label} ('{self}')"

    @property
    def heading(self) -> str:
        """The label with a capital letter."""
        return self.label[0].upper() + self.label[1:]


def described(opening: str, criteria: type[Criterion]) -> str:
    """Return a field's description: an opening sentence, then each name with what it does."""
    return f"{opening} " + "; ".join(f"{name}: {name.description}" for name in criteria) + "."


class DepthCriterion(Criterion):
    """Which layers go.

    outcome: the sentence below the report's chart of the layers' scores.
    """

    def __init__(self, value: str, label: str, description: str, outcome: str) -> None:
        super().__init__(value, label, description)
        self.outcome = outcome

    LAST = (
        "last",
        "position",
        "the last ones (the paper's choice)",
        "The last layers went, whatever their score; the score says how much each turns the hidden state.",
    )
    SIMILARITY = (
        "similarity",
        "cosine of the mean hidden states",
        "the run that starts where the mean hidden state turns least",
        "A run of layers went that starts at the highest cosine: where the mean hidden state turns least.",
    )
    BLOCK_INFLUENCE = (
        "block_influence",
        "block influence",
        "those that turn a token's hidden state least",
        "The lowest bars went: the layers that turn the hidden state least.",
    )
    MEASURED = (
        "measured",
        "the KL without them",
        "those without which the KL to the whole model is smallest (layers with little block influence are really left out, one more or "
        "one whole period more in each round, and the best sets are refitted, on `calibration.depth_samples` sequences)",
        "Layers were left out to see, one more in each round, among those with low bars; those went without which the KL "
        "to the whole model is smallest.",
    )


class WidthCriterion(Criterion):
    """What stays of the residual stream; the label is what a channel's score is.

    unit: what the stream is counted in. total: what the scores of all units add up to.
    """

    def __init__(self, value: str, label: str, description: str, total: str, unit: str = "channels") -> None:
        super().__init__(value, label, description)
        self.total = total
        self.unit = unit

    NORM_ACTIVATION = (
        "norm_activation",
        "mean |norm output|",
        "the channels with the largest norm outputs as they stand (the paper's choice)",
        "all activation",
    )
    ROTATION = (
        "rotation",
        "share of the second moments of the norms' inputs",
        "the principal directions after one rotation of the whole model, which needs statistics with second moments",
        "these moments",
        "directions",
    )
    WEIGHT_MAGNITUDE = (
        "weight_magnitude",
        "mean share of the squared weights",
        "for comparison, the channels with the largest weights",
        "all squared weights",
    )
    RANDOM = (
        "random",
        "a random number",
        "for comparison, random channels",
        "the sum of these numbers, which mean nothing",
    )


class ExpertImportance(Criterion):
    """How an expert is scored."""

    FREQUENCY = ("frequency", "share of tokens", "how often it is chosen")
    SOFT_LOGITS = ("soft_logits", "mean gate weight", "its mean gate over all tokens")
    REAP = ("reap", "REAP score", "its mean gated output norm over its own tokens (the paper's choice)")
    OUTPUT_NORM = ("output_norm", "mean gated output norm", "its mean gated output norm over all tokens")


class ExpertCompression(Criterion):
    """What becomes of the experts that are not among the best.

    outcome: the sentence below the report's chart of what became of each expert.
    """

    def __init__(self, value: str, label: str, description: str, outcome: str) -> None:
        super().__init__(value, label, description)
        self.outcome = outcome

    PRUNE = ("prune", "others dropped", "drop the others", "The least important experts were dropped.")
    MERGE = (
        "merge",
        "others merged",
        "average each of the others into the kept expert most similar to it",
        "Every expert that left was averaged into the survivor most like it, its base.",
    )
    PARTIAL = (
        "partial",
        "others merged into the lower half",
        "the top half stays untouched, the next half are bases that absorb the others (the paper's choice)",
        "The better half of the survivors stayed as they were (kept); the others are bases, which absorbed the rest.",
    )


class ExpertSimilarity(Criterion):
    """What merging compares."""

    ROUTER_LOGITS = ("router_logits", "router logits", "their router logits over the calibration tokens")
    ROUTER_WEIGHTS = ("router_weights", "router rows", "their rows of the router")
    EXPERT_OUTPUT = (
        "expert_output",
        "mean outputs",
        "their mean outputs on the tokens routed to them (the paper's choice)",
    )


class DivergenceName(Criterion):
    """What the KD terms of the loss minimise."""

    FORWARD_KL = ("forward_kl", "KL(teacher || student)", "KL(teacher || student)")
    REVERSE_KL = ("reverse_kl", "KL(student || teacher)", "KL(student || teacher)")
    JSD = ("jsd", "Jensen-Shannon divergence", "the Jensen-Shannon divergence")


class TrainedParts(Criterion):
    """What of a student is trained: presets, and the parts of a model as the families name them."""

    ALL = ("all", "every part", "every part")
    NO_EXPERTS = ("no_experts", "all but the routed experts", "every part but the routed experts")
    ROUTER_ONLY = ("router_only", "the routers alone", "the routers alone")
    EMBEDDING = ("embedding", "embedding and lm_head", "the embedding and lm_head")
    NORM = ("norm", "norms", "the norms around the layers' mixers and MLPs, and the last one")
    ATTENTION = ("attention", "attention", "the attention mixers")
    DELTANET = ("deltanet", "DeltaNet", "the DeltaNet mixers")
    DENSE_MLP = ("dense_mlp", "dense MLPs", "the MLPs of layers without experts")
    ROUTER = ("router", "routers", "the routers")
    ROUTED_EXPERTS = ("routed_experts", "routed experts", "the routed experts")
    SHARED_EXPERTS = ("shared_experts", "shared experts", "the shared experts and their gates")
    MTP_PROJECTION = ("mtp_projection", "MTP projection", "the projection at the MTP module's input")

    @property
    def parts(self) -> set[str]:
        """The parts that this word stands for."""
        presets = {TrainedParts.ALL, TrainedParts.NO_EXPERTS, TrainedParts.ROUTER_ONLY}
        every = {str(part) for part in TrainedParts if part not in presets}
        if self == TrainedParts.ALL:
            return every
        if self == TrainedParts.NO_EXPERTS:
            return every - {"routed_experts"}
        return {"router"} if self == TrainedParts.ROUTER_ONLY else {str(self)}
