"""Streaming calibration: the layers one after another, each on all of the text, for models that do not fit into memory.

Between two layers the hidden states of the whole text lie in a file (`layerwise`), or in one for each rank that measures a share.
An interrupted walk continues with the layer under way, on another number of ranks too: what is finished lies in a folder per
layer, beside the result.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from slimqwen.artifacts import fingerprint_value
from slimqwen.artifacts.disk import check_space
from slimqwen.calibration.observe import add_layer_sums, observe_blocks
from slimqwen.calibration.statistics import FORMAT, Statistics
from slimqwen.calibration.text import CalibrationText
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.progress import Progress, say
from slimqwen.core.stopwatch import Stopwatch
from slimqwen.layerwise.memory import Allotment, settings_of
from slimqwen.layerwise.ranks import shared_scratch_folder
from slimqwen.layerwise.step import Step
from slimqwen.layerwise.stream import Stream, Visitor
from slimqwen.layerwise.walk import walk_layers
from slimqwen.parallel.job import Job
from slimqwen.recipe import Execution

# In the folder of each layer that is finished:
BLOCK_SUMS = "statistics.safetensors"  # what was measured inside the layer
LAYER_SUMS = "layers.safetensors"  # what was measured between the layers, up to this one
HIDDEN_STATES = (
    "hidden_states"  # each rank's: the layer's output, raw, [rows, seq, hidden]; the last finished layer's only
)


def is_unfinished(out: Path) -> bool:
    """Return whether a walk that was to write `out` was interrupted (what `scratch_folder` keeps is still there)."""
    return out.with_name(f".{_scratch(out).name}.partial").is_dir()


def _scratch(out: Path) -> Path:
    return out.with_name(f"{out.name}.layers")


class LayerSums(Visitor):
    """Adds up what each layer changes in the residual stream, and assigns the sums of every chunk to its part of the text.

    inside: the sums that hooks in the layer add to; between: those over the hidden states before and after the
    layer, of `layers`, `rows_per_pass` rows at a time.
    """

    def __init__(
        self,
        text: CalibrationText,
        inside: Statistics,
        between: Statistics,
        watch: Stopwatch,
        *,
        layers: int,
        rows_per_pass: int,
    ) -> None:
        self._text, self._inside, self._between, self._watch = text, inside, between, watch
        self._layers, self._rows_per_pass = layers, rows_per_pass

    @contextmanager
    def chunk(self, rows: slice) -> Iterator[None]:
        """Open the part that these rows are of."""
        part = self._text.part_at(rows.start)
        with self._inside.part(part), self._between.part(part):
            yield

    def receive(self, step: Step, before: Tensor, after: Tensor) -> None:
        """Add a decoder layer's sums."""
        if step.number is None:
            return
        with self._watch:
            for rows in zip(before.split(self._rows_per_pass), after.split(self._rows_per_pass), strict=True):
                add_layer_sums(self._between, step.number, self._layers, *rows)


class Walk:
    """Measures a text on one layer of the checkpoint after another, each rank of `job` its share, `text`.

    The sums are those of a pass in memory, up to the rounding of float32: larger batches are added up in another order.
    Interrupted and continued by as many ranks, they are the same to the bit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: CalibrationText,
        allotment: Allotment,
        dtype: torch.dtype,
        device: torch.device,
        second_moments: bool,
        job: Job,
    ) -> None:
        self._text, self._allotment, self._second_moments, self._job = text, allotment, second_moments, job
        self._stream = Stream(
            checkpoint,
            text,
            allotment,
            dtype,
            device,
            hidden_dtype=dtype,
            sections=text.sections,
            first_row=text.first_row,
        )
        self._measuring = Stopwatch()

    def run(self, blank: Statistics, out: Path, execution: Execution, title: str) -> None:
        """Write to `out` the statistics that `blank` announces. Continues where the same walk was interrupted.

        The key is of what the user has set, and not of what it comes to on so many ranks, so that another number can continue.
        """
        settings = [*settings_of(execution), str(self._stream.dtype), self._stream.device.type]
        key = fingerprint_value([FORMAT, blank.checkpoint, blank.data, *settings, self._second_moments])
        tokens = sum(counts["main"] for counts in blank.tokens.values())
        with shared_scratch_folder(_scratch(out), key, self._job) as folder:
            self._announce(folder, tokens, title)
            finished = self._walk(folder, blank, tokens, title)

            def save() -> str:
                layers = Statistics.load(finished[-1] / LAYER_SUMS)
                Statistics.joined([layers, *(Statistics.load(path / BLOCK_SUMS) for path in finished)]).save(out)
                return str(out)

            self._job.lead(save)

    def _announce(self, folder: Path, tokens: int, title: str) -> None:
        """Print what the work will take. Raises StageFailed where the disk is too small."""
        of_text = tokens * self._stream.shape[2] * self._stream.dtype.itemsize
        sums = len(self._stream.steps) * self._allotment.sums_bytes
        needed = 2 * (of_text + sums)  # the text before and after a layer; the sums by layer and together
        free = shutil.disk_usage(folder).free
        size, allotment = self._job.share[1], self._allotment
        of_each = f", on each of {size} ranks" if size > 1 else ""
        memory = f"{bytes_in_words(allotment.total_bytes)} of memory"
        if self._stream.device.type == "cuda":
            on_gpu = allotment.on_gpu_bytes
            memory = f"{bytes_in_words(on_gpu)} of the GPU's memory, {bytes_in_words(allotment.total_bytes - on_gpu)} of the host's"
        say(
            f"{title}: layer by layer, {allotment.rows_per_pass} sequences through a token mixer at once and "
            f"{allotment.rows_per_chunk} through the experts{of_each}; it takes {memory} "
            f"(page cache apart) and {bytes_in_words(needed)} of disk, {bytes_in_words(free)} are free"
        )
        check_space(folder.parent, needed, free, "measure fewer samples")

    def _walk(self, folder: Path, blank: Statistics, tokens: int, title: str) -> list[Path]:
        """Take the text through every layer; return the folders of all of them."""
        layers_here = 0

        def take(number: int, before: Path | None, after: Path, progress: Progress) -> None:
            nonlocal layers_here
            self._take(self._stream.steps[number], before, after, blank, progress)
            layers_here += 1

        started = time.perf_counter()
        finished = walk_layers(
            folder,
            len(self._stream.steps),
            take,
            job=self._job,
            tokens=sum(self._text.tokens.values()),
            title=title,
            hidden_states=(HIDDEN_STATES,),
        )
        if layers_here:
            self._report(title, tokens * layers_here / len(finished), time.perf_counter() - started)
        return finished

    def _take(self, step: Step, before: Path | None, after: Path, blank: Statistics, progress: Progress) -> None:
        """Take all of the text through one step: from the folder of the step before, if there is one, to this step's."""
        stream = self._stream
        inside, between = replace(blank, sums={}), replace(blank, sums={})
        out = stream.create(after / HIDDEN_STATES)
        hidden = stream.embed(out) if before is None else stream.open(before / HIDDEN_STATES, into=out)
        visitor = LayerSums(
            self._text,
            inside,
            between,
            self._measuring,
            layers=stream.checkpoint.config["num_hidden_layers"],
            rows_per_pass=self._allotment.rows_per_pass,
        )
        with (
            stream.weights_of(step),
            observe_blocks(stream.model, step.blocks, inside, self._measuring, self._second_moments),
        ):
            stream.advance(step, hidden, progress.advance, out=out, visitor=visitor, with_norm=True)
        with stream.writing:
            stream.flush(after / HIDDEN_STATES)
            self._save(inside, between, before, after)

    def _save(self, inside: Statistics, between: Statistics, before: Path | None, after: Path) -> None:
        """Add up the sums of all ranks, and write them on the first: `between` with those of the layers before."""
        assert isinstance(inside.sums, dict) and isinstance(between.sums, dict)
        self._job.add_up(inside.sums)
        self._job.add_up(between.sums)
        if not self._job.is_first:
            return
        if before is not None:
            for name, sums in Statistics.load(before / LAYER_SUMS).sums.items():
                between.sums[name] = between.sums[name] + sums if name in between.sums else sums
        inside.save(after / BLOCK_SUMS)
        between.save(after / LAYER_SUMS)

    def _report(self, title: str, tokens: float, seconds: float) -> None:
        watches = (self._measuring, self._stream.reading, self._stream.writing)
        measuring, reading, writing = (watch.seconds for watch in watches)
        own = seconds - measuring - reading - writing
        say(
            f"{title}: {tokens / seconds:,.0f} tokens/s through all layers; {own / seconds:.0%} of the time in the model's own "
            f"forward pass, {measuring / seconds:.0%} measuring, {reading / seconds:.0%} reading weights, "
            f"{writing / seconds:.0%} writing"
        )
