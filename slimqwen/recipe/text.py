"""How a stage reads the text that it runs a model on."""

from typing import Annotated, Literal

from pydantic import Field

from slimqwen.recipe.data import DocumentBoundaries
from slimqwen.recipe.section import MOST, Section, SeedInt

Dtype = Literal["auto", "float32", "bfloat16"]


class TextSettings(Section):
    """What all stages that run a model on text have in common. Part of the key of what they make (`Recipe.text`)."""

    sequence_length: Annotated[int, Field(ge=8, le=MOST)] = Field(description="Tokens in one sequence.")
    documents: DocumentBoundaries = Field(
        "packed",
        description="'packed': a sequence may hold several documents, which then see each other; 'isolated': one document, or a piece "
        "of one, and padding. Stages that calibrate read packed sequences in either case.",
    )
    seed: SeedInt = Field(0, description="Seed of the order in which the training text is read.")
    dtype: Dtype = Field(
        "auto",
        description="Compute dtype of a model that is not trained. 'auto': bfloat16 on a GPU, float32 on a CPU.",
    )

    @property
    def packed(self) -> "TextSettings":
        """Return the settings of the stages that calibrate: the same, with packed sequences."""
        return self.model_copy(update={"documents": "packed"})
