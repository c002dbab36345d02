"""The resumable walk over a model's layers: a folder for each one that is finished."""

from collections.abc import Callable, Collection
from pathlib import Path

from slimqwen.artifacts import atomic_folder
from slimqwen.core.progress import Progress

TakeLayer = Callable[[int, Path | None, Path, Progress], None]
"""Takes the text through layer `number`: (number, folder of the layer before or None, empty folder of this one, progress)."""


def walk_layers(
    folder: Path, layers: int, take: TakeLayer, *, tokens: int, title: str, hidden_states: Collection[str]
) -> list[Path]:
    """Call `take` for each of `layers` layers that has no folder in `folder` yet; return the folders of all of them.

    A layer's folder is complete or not there (`atomic_folder`), so an interrupted walk continues with the layer under way.

    Args:
        tokens: of the text, which `take` counts once per layer in the progress.
        hidden_states: the files in a layer's folder that only the next layer needs; they are removed when it is finished.
    """
    finished = [folder / f"{number:03d}" for number in range(layers)]
    found = next((number for number, path in enumerate(finished) if not path.exists()), layers)
    with Progress(title, total=tokens * layers, unit="token-layers", start=tokens * found) as progress:
        for number in range(found, layers):
            progress.advance(0, layer=f"{number + 1}/{layers}")
            with atomic_folder(finished[number]) as partial:
                take(number, finished[number - 1] if number else None, partial, progress)
            for path in finished[:number]:
                for name in hidden_states:
                    (path / name).unlink(missing_ok=True)
    return finished
