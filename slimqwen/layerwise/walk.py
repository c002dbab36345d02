"""The resumable walk over a model's layers: a folder for each one that is finished."""

from collections.abc import Callable, Collection
from pathlib import Path

from slimqwen.artifacts import atomic_folder, joined_folder
from slimqwen.core.progress import Progress
from slimqwen.layerwise.ranks import AnyJob

TakeLayer = Callable[[int, Path | None, Path, Progress], None]
"""Takes the text through layer `number`: (number, folder of the layer before or None, empty folder of this one, progress)."""


def walk_layers(
    folder: Path,
    layers: int,
    take: TakeLayer,
    *,
    job: AnyJob,
    tokens: int,
    title: str,
    hidden_states: Collection[str],
) -> list[Path]:
    """Call `take` for each of `layers` layers that has no folder in `folder` yet; return the folders of all of them.

    A layer's folder is complete or not there (`atomic_folder`), so an interrupted walk continues with the layer under way. Of
    several ranks, which all call this, the first makes the folder, and all `take` the layer, each on rows of its own and into
    files of its own; the layer is finished when all of them are.

    Args:
        tokens: of the text, or of this rank's rows, which `take` counts once per layer in the progress.
        hidden_states: the files in a layer's folder that only the next layer needs, one for each rank (`Stream.create`); they
            are removed when it is finished.
    """
    finished = [folder / f"{number:03d}" for number in range(layers)]

    def first_missing() -> str:
        return str(next((number for number, path in enumerate(finished) if not path.exists()), layers))

    found = int(job.lead(first_missing))
    with Progress(title, total=tokens * layers, unit="token-layers", start=tokens * found) as progress:
        for number in range(found, layers):
            progress.advance(0, layer=f"{number + 1}/{layers}")
            with atomic_folder(finished[number]) if job.is_first else joined_folder(finished[number]) as partial:
                job.wait()  # for the folder
                take(number, finished[number - 1] if number else None, partial, progress)
                job.wait()  # for the files of all ranks
            if job.is_first:
                for path in finished[:number]:
                    for name in hidden_states:
                        for file in path.glob(f"{name}.*"):
                            file.unlink()
        job.wait()  # for the last folder's name
    return finished
