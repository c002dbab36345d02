"""Text: what is read, and how it is cut into sequences."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimqwen.recipe.section import MOST, PathField, PositiveFloat, Section

BuiltinSource = Literal["python-stdlib", "python-packages"]
DocumentBoundaries = Literal["packed", "isolated"]
TextFormat = Literal["text", "json", "jsonl", "csv", "tsv", "parquet"]


class Source(Section):
    """One source of text. Give exactly one of `builtin`, `path` and `megatron`."""

    builtin: BuiltinSource | None = Field(
        None,
        description="'python-stdlib': the standard library of the running interpreter; "
        "'python-packages': the packages installed beside slimqwen. Nothing is downloaded.",
    )
    path: PathField | None = Field(
        None,
        description="A table (.jsonl, .ndjson, .json, .csv, .tsv, .parquet: one document per row), a text (.txt, .md and the like, "
        "source files: one document), each also as .gz or .zst, or a folder of them. Beside tables only the tables are read, and of a "
        "data set in splits not its test and validation splits: what is left out is said.",
    )
    format: TextFormat | None = Field(
        None,
        description="How a file is read whatever its name: 'text' (one document), 'jsonl' (a row to a line), 'json' (a list of rows, "
        "or rows one after the other), 'csv', 'tsv', 'parquet'. Of a folder: only its files of this format. Default: by its name.",
    )
    megatron: PathField | None = Field(
        None,
        description="PREFIX of token ids made elsewhere, PREFIX.bin and PREFIX.idx, with the teacher's tokenizer. They are read "
        "where they are, and all of them are for training: the held-out text comes from other sources.",
    )
    name: str | None = Field(
        None,
        description="What it is called in a mixture: its folder among the tokens. Default: the last part of its path.",
    )
    weight: PositiveFloat | None = Field(
        None,
        description="Share of the training tokens drawn from this source, beside the others' weights; its text is repeated "
        "or left unused as that takes. Give every source a weight, or none: then each text is read once per epoch.",
    )
    text_field: str = Field(
        "text",
        description="The column of a table that holds the text. Without a column 'text', conversations in 'messages' or "
        "'conversations' are rendered by the tokenizer's chat template.",
    )
    keep_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="Share of this source's documents to keep, at most 1."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        if [self.builtin, self.path, self.megatron].count(None) != 2:
            raise ValueError("give exactly one of 'builtin', 'path' and 'megatron'")
        if self.megatron is not None and self.keep_fraction < 1.0:
            raise ValueError(
                "keep_fraction chooses among documents of text, and 'megatron' is token ids: give a weight"
            )
        if self.path is None and self.format is not None:
            raise ValueError("format says how the files of a 'path' are read: leave it out")
        return self


class DataRecipe(Section):
    """What the model is trained, calibrated and evaluated on."""

    sources: list[Source] = Field(
        [Source(builtin="python-stdlib")], min_length=1, description="Where the text comes from."
    )
    heldout_sources: list[Source] = Field(
        [],
        description="Text for evaluation only; of a data set in splits its test and validation splits. Empty: a share of `sources` is "
        "held out by a hash of each document's path, or where there are too few documents, the end of the text.",
    )
    heldout_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.05, description="Share of documents held out when `heldout_sources` is empty."
    )
    sequence_length: Annotated[int, Field(ge=8, le=MOST)] = Field(256, description="Tokens in one training sequence.")
    documents: DocumentBoundaries = Field(
        "packed",
        description="How training and evaluation cut rows. 'packed': documents back to back, and a row's tokens see the document "
        "before theirs. 'isolated': a row holds one document, or a piece of a long one, and padding, which distil.tokens "
        "counts and no loss does. Calibration reads packed rows, which have no padding, in either case.",
    )
    separator: str | None = Field(
        None,
        description="Token that ends each document, as the vocabulary or as text has it ('<|endoftext|>'); the text must be one token. "
        "Default: the tokenizer's eos, or where this only ends a turn of its chat template the token that ends a text for the model.",
    )
