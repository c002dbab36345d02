"""What calibration measures: sums and counts in float64, so that runs, ranks and shards add up exactly."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slimqwen.artifacts import atomic_file
from slimqwen.errors import UserError

FORMAT = "slimqwen.statistics/1"


@dataclass
class Statistics:
    """Sums over calibration tokens, by name; every name is one of

        norm/{tensor}/abs_sums             [hidden]       sum over tokens of |norm's output|, per residual channel
        layers/hidden_sums                 [layers+1, H]  sum over tokens of the hidden state before layer 0, after layer 0, ..
        layers/cosine_sums                 [layers]       sum over tokens of cos(hidden before, hidden after the layer)
        experts/{block}/assignments        [experts]      tokens routed to each expert
        experts/{block}/gate_sums          [experts]      sum over them of the gate weight, renormalised over the chosen
        experts/{block}/gated_norm_sums    [experts]      sum over them of gate weight x ||E(x)||_2
        experts/{block}/output_sums        [experts, H]   sum over them of E(x)
        experts/{block}/logit_gram         [experts, experts]  sum over all tokens of logit_i x logit_j

    `tokens` counts the tokens that each sum runs over: `tokens["main"]` for the backbone, `tokens["mtp"]` for the MTP
    module. `checkpoint` and `data` are the fingerprints of what was measured on what.
    """

    checkpoint: str
    data: str
    tokens: dict[str, int]
    sums: dict[str, torch.Tensor]

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add one batch's sum, of any float dtype, in float64 on the CPU."""
        value = value.detach().to("cpu", torch.float64)
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def of_experts(self, block: str) -> dict[str, torch.Tensor]:
        """The sums of one block's experts: assignments, gate_sums, gated_norm_sums, output_sums, logit_gram."""
        prefix = f"experts/{block}/"
        return {name.removeprefix(prefix): value for name, value in self.sums.items() if name.startswith(prefix)}

    def __add__(self, other: "Statistics") -> "Statistics":
        """Statistics of both token sets together. Raises UserError where they were measured on different checkpoints."""
        if self.checkpoint != other.checkpoint or self.sums.keys() != other.sums.keys():
            raise UserError("statistics of two different checkpoints cannot be added: calibrate both on the same one.")
        tokens = {part: self.tokens[part] + other.tokens[part] for part in self.tokens}
        sums = {name: self.sums[name] + other.sums[name] for name in self.sums}
        return Statistics(self.checkpoint, f"{self.data}+{other.data}", tokens, sums)

    def save(self, path: Path) -> None:
        metadata = {"format": FORMAT, "checkpoint": self.checkpoint, "data": self.data}
        metadata |= {f"tokens.{part}": str(count) for part, count in self.tokens.items()}
        check_finite(self.sums, path)
        with atomic_file(path) as partial:
            save_file(dict(sorted(self.sums.items())), partial, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Raises UserError for a file that is missing, corrupt, or not statistics, and for values that are not finite."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is not a readable statistics file: {error}. Run `slimqwen calibrate` again."
            ) from error
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path} is not a statistics file of {FORMAT}: run `slimqwen calibrate` to make one.")
        check_finite(sums, path)
        tokens = {
            key.removeprefix("tokens."): int(count) for key, count in metadata.items() if key.startswith("tokens.")
        }
        return cls(metadata["checkpoint"], metadata["data"], tokens, sums)


def check_finite(sums: dict[str, torch.Tensor], path: Path) -> None:
    """Raise UserError where one of the sums that `path` holds, or would hold, is not finite."""
    for name, value in sums.items():
        if not torch.isfinite(value).all():
            raise UserError(
                f"{path}: statistics are not finite, in {name}: the model overflowed on the calibration text."
            )
