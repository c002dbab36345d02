"""Streaming calibration: the layers one after another, each on all of the text, for models that do not fit into memory.

Between two layers the hidden states of the whole text lie in a file. Within a layer a chunk of rows goes through in two
strides: the token mixer in passes of a few sequences, because its activations are large; then the experts on the whole
chunk at once, because each of them has to be read for it.

An interrupted walk continues with the layer under way: what is finished lies in a folder per layer, beside the result.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from slimqwen.artifacts import atomic_folder, fingerprint_value, scratch_folder
from slimqwen.calibration.observe import add_layer_sums, observe_blocks
from slimqwen.calibration.statistics import FORMAT, Statistics
from slimqwen.calibration.text import CalibrationText
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.errors import StageFailed
from slimqwen.core.progress import Progress, say
from slimqwen.core.stopwatch import Stopwatch
from slimqwen.layerwise.memory import Allotment
from slimqwen.layerwise.step import Step, embeddings, steps_of
from slimqwen.layerwise.weights import weights_of, without_weights

# In the folder of each layer that is finished:
BLOCK_SUMS = "statistics.safetensors"  # what was measured inside the layer
LAYER_SUMS = "layers.safetensors"  # what was measured between the layers, up to this one
HIDDEN_STATES = "hidden_states"  # the layer's output, raw, [rows, seq, hidden]; the last finished layer's only


def is_unfinished(out: Path) -> bool:
    """Whether a walk that was to write `out` was interrupted (what `scratch_folder` keeps is still there)."""
    return out.with_name(f".{_scratch(out).name}.partial").is_dir()


def _scratch(out: Path) -> Path:
    return out.with_name(f"{out.name}.layers")


class Walk:
    """Measures `text` on one layer of the checkpoint after another.

    The sums are those of a pass in memory, up to the rounding of float32: larger batches are added up in another order.
    Interrupted and continued, they are the same to the bit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: CalibrationText,
        allotment: Allotment,
        dtype: torch.dtype,
        device: torch.device,
        second_moments: bool,
    ) -> None:
        self._checkpoint, self._text, self._allotment = checkpoint, text, allotment
        self._second_moments = second_moments
        self._dtype, self._device = dtype, device
        self._model = without_weights(checkpoint, dtype, device)
        self._steps = steps_of(self._model)
        self._tokens = sum(text.tokens.values())
        self._hidden_size = checkpoint.config["hidden_size"]
        self._measuring, self._reading, self._writing = Stopwatch(), Stopwatch(), Stopwatch()

    def run(self, blank: Statistics, out: Path, title: str) -> None:
        """Write to `out` the statistics that `blank` announces. Continues where the same walk was interrupted."""
        settings = [self._allotment.rows_per_pass, self._allotment.rows_per_chunk, str(self._dtype), self._device.type]
        key = fingerprint_value([FORMAT, blank.checkpoint, blank.data, *settings, self._second_moments])
        with scratch_folder(_scratch(out), key) as folder:
            self._announce(folder, title)
            finished = self._walk(folder, blank, title)
            layers = Statistics.load(finished[-1] / LAYER_SUMS)
            Statistics.joined([layers, *(Statistics.load(path / BLOCK_SUMS) for path in finished)]).save(out)

    def _announce(self, folder: Path, title: str) -> None:
        """Say what the work will take. Raises StageFailed where the disk is too small."""
        of_text = self._tokens * self._hidden_size * self._dtype.itemsize
        sums = len(self._steps) * self._allotment.sums_bytes
        needed = 2 * (of_text + sums)  # the text before and after a layer; the sums by layer and together
        free = shutil.disk_usage(folder).free
        say(
            f"{title}: layer by layer, {self._allotment.rows_per_pass} sequences through a token mixer at once and "
            f"{self._allotment.rows_per_chunk} through the experts; it takes {bytes_in_words(self._allotment.total_bytes)} "
            f"of memory (page cache apart) and {bytes_in_words(needed)} of disk, {bytes_in_words(free)} are free"
        )
        if needed > free:
            raise StageFailed(
                f"{bytes_in_words(needed)} are to be written to {folder.parent}, and {bytes_in_words(free)} are free: make "
                "room, write to another disk, or measure fewer samples."
            )

    def _walk(self, folder: Path, blank: Statistics, title: str) -> list[Path]:
        """The folder of every layer, each finished."""
        finished = [folder / f"{number:03d}" for number in range(len(self._steps))]
        found = next((number for number, path in enumerate(finished) if not path.exists()), len(finished))
        total = self._tokens * len(self._steps)
        started = time.perf_counter()
        with Progress(title, total=total, unit="token-layers", start=self._tokens * found) as progress:
            for number in range(found, len(self._steps)):
                before = finished[number - 1] if number else None
                with atomic_folder(finished[number]) as partial:
                    self._take(self._steps[number], before, partial, blank, progress)
                for path in finished[:number]:
                    (path / HIDDEN_STATES).unlink(missing_ok=True)
        if found < len(self._steps):
            self._report(title, (total - self._tokens * found) / len(self._steps), time.perf_counter() - started)
        return finished

    def _take(self, step: Step, before: Path | None, after: Path, blank: Statistics, progress: Progress) -> None:
        """One step on all of the text: from the folder of the step before, if there is one, to the folder of this one."""
        sums = replace(blank, sums={})
        layers = replace(blank, sums={} if before is None else dict(Statistics.load(before / LAYER_SUMS).sums))
        with (
            weights_of(step.blocks, self._model, self._checkpoint, self._dtype, self._device, self._reading),
            observe_blocks(self._model, step.blocks, sums, self._measuring, self._second_moments),
            (after / HIDDEN_STATES).open("wb") as file,
        ):
            row = 0
            for part, tokens in self._text.batches(self._allotment.rows_per_chunk):
                hidden = self._embedded(tokens) if before is None else self._stored(before, row, tokens)
                row += len(tokens)
                with sums.part(part), layers.part(part):
                    result = self._through(step, hidden, tokens, layers)
                with self._writing:
                    file.write(result.cpu().contiguous().view(torch.uint8).numpy().data)
                progress.advance(tokens[:, 1:].numel(), layer=f"{self._steps.index(step) + 1}/{len(self._steps)}")
        with self._writing:
            sums.save(after / BLOCK_SUMS)
            layers.save(after / LAYER_SUMS)

    def _embedded(self, tokens: Tensor) -> Tensor:
        """What goes into the first layer, [rows, seq, hidden]."""
        return embeddings(self._model, tokens[:, :-1], self._dtype, self._device)

    def _stored(self, folder: Path, first_row: int, tokens: Tensor) -> Tensor:
        """What goes into a later layer: some rows of the file that the layer before has written, memory-mapped."""
        row = (tokens.shape[1] - 1, self._hidden_size)
        everything = torch.from_file(
            str(folder / HIDDEN_STATES), shared=False, size=self._tokens * self._hidden_size, dtype=self._dtype
        )
        return everything.view(-1, *row)[first_row : first_row + len(tokens)].to(self._device)

    def _through(self, step: Step, hidden: Tensor, tokens: Tensor, layers: Statistics) -> Tensor:
        """A chunk's hidden states [rows, seq, hidden] after the step; `tokens` are its rows, [rows, seq + 1]."""
        rows_per_pass = self._allotment.rows_per_pass
        result = step.through(hidden, tokens, rows_per_pass)
        if step.number is not None:
            with self._measuring:
                number_of_layers = self._checkpoint.config["num_hidden_layers"]
                for before, after in zip(hidden.split(rows_per_pass), result.split(rows_per_pass), strict=True):
                    add_layer_sums(layers, step.number, number_of_layers, before, after)
        return result if step.norm is None else torch.cat([step.norm(rows) for rows in result.split(rows_per_pass)])

    def _report(self, title: str, tokens: float, seconds: float) -> None:
        measuring, reading, writing = (watch.seconds for watch in (self._measuring, self._reading, self._writing))
        own = seconds - measuring - reading - writing
        say(
            f"{title}: {tokens / seconds:,.0f} tokens/s through all layers; {own / seconds:.0%} of the time in the model's own "
            f"forward pass, {measuring / seconds:.0%} measuring, {reading / seconds:.0%} reading weights, "
            f"{writing / seconds:.0%} writing"
        )
