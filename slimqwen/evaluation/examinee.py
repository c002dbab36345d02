"""A model that is measured, and one with all its weights in memory: whole, or sharded over the ranks of a job."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.data.stream import Batch
from slimqwen.evaluation.acceptance import accepted_drafts, continue_greedily
from slimqwen.evaluation.fidelity import Recording, record
from slimqwen.generation import DEFAULT_DRAFT
from slimqwen.generation.acceptance import speculative_acceptance
from slimqwen.model.model import MtpCausalLM
from slimqwen.parallel.job import Job


class Examinee(ABC):
    """A model that is measured. All ranks of the job call the same methods in the same order, with as many rows or prompts.

    has_mtp: whether it has an MTP module to draft with.
    """

    has_mtp: bool

    @abstractmethod
    def record(self, rows: Batch, title: str) -> Recording:
        """Run on this rank's rows, and record the outputs."""

    @abstractmethod
    def batches(self, prompts: Tensor) -> Sequence[Tensor]:
        """Split this rank's prompts into those that are continued together."""

    @abstractmethod
    def continue_greedily(self, prompts: Tensor, new_tokens: int, count: Callable[[int], None]) -> Tensor:
        """Continue a batch of prompts, as `acceptance.continue_greedily` does; call `count` with the number of tokens made."""

    @abstractmethod
    def accepted_drafts(self, sequences: Tensor, prompt_tokens: int, depth: int) -> Tensor:
        """Find the accepted drafts in a batch of continuations, as `acceptance.accepted_drafts` does."""

    @abstractmethod
    def tokens_per_verification(self, prompts: Tensor, new_tokens: int, title: str) -> float | None:
        """Decode speculatively after prompts, the same on every rank, and return the tokens per forward pass; None: not measured."""


class InMemory(Examinee):
    """A model with all its weights in memory: of this process, or of the ranks that share a copy of it."""

    def __init__(self, model: MtpCausalLM, checkpoint: Checkpoint, batch_size: int, job: Job) -> None:
        self.model = model
        self.has_mtp = model.mtp is not None
        self._checkpoint, self._batch_size, self._job = checkpoint, batch_size, job

    def record(self, rows: Batch, title: str) -> Recording:
        family, config = self._checkpoint.family, self._checkpoint.config
        return record(self.model, family, config, rows, batch_size=self._batch_size, title=title, job=self._job)

    def batches(self, prompts: Tensor) -> Sequence[Tensor]:
        return prompts.split(self._batch_size)

    def continue_greedily(self, prompts: Tensor, new_tokens: int, count: Callable[[int], None]) -> Tensor:
        sequences = continue_greedily(self.model.backbone, prompts, new_tokens)
        count(len(prompts) * new_tokens)
        return sequences

    def accepted_drafts(self, sequences: Tensor, prompt_tokens: int, depth: int) -> Tensor:
        return accepted_drafts(self.model, sequences, prompt_tokens, depth)

    def tokens_per_verification(self, prompts: Tensor, new_tokens: int, title: str) -> float | None:
        def agree(tokens: Sequence[int]) -> list[int]:
            agreed: list[int] = self._job.gather(list(tokens))[0]
            return agreed

        measured = speculative_acceptance(
            self.model, prompts, draft=DEFAULT_DRAFT, new_tokens=new_tokens, title=title, agree=agree
        )
        return measured["tokens_per_verification"]
