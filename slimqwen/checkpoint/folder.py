"""Folders that are not the checkpoint that was meant: what each is, and the way from there to a checkpoint."""

from collections.abc import Iterable
from pathlib import Path

from slimqwen.core.errors import UserError, shown

READ_AND_SAVE = "AutoModelForCausalLM.from_pretrained({arguments}).save_pretrained(FOLDER)"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHER_FRAMEWORKS = (".h5", ".msgpack", ".onnx")
MOST_ENTRIES = 10_000  # of a folder, that are looked at
CONFIG = "config.json"


def snapshot_of(folder: Path) -> Path:
    """The snapshot in the root of a model's cache (`models--org--name`), as the Hugging Face hub lays it out; else `folder`.

    It is the one that refs/main names, or the only one. Raises UserError where there are several and none is named.
    """
    if (folder / CONFIG).exists() or not (folder / "snapshots").is_dir():
        return folder
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = _first_line(folder / "refs" / "main")
    named = [path for path in snapshots if path.name == main]
    if named or len(snapshots) == 1:
        return (named or snapshots)[0]
    if not snapshots:
        raise UserError(f"{folder} is the root of a model's cache without a snapshot: download the model again.")
    raise UserError(
        f"{folder} is the root of a model's cache with {len(snapshots)} snapshots, and refs/main names none of them: give "
        f"one, such as {snapshots[0]}."
    )


def what_it_is(folder: Path) -> str | None:
    """What a folder without a checkpoint's files is, and what to do; None where nothing is recognised."""
    if not folder.is_dir():
        return None
    names = [path.name for _, path in zip(range(MOST_ENTRIES), folder.iterdir(), strict=False)]
    if "adapter_config.json" in names:
        return (
            "it is an adapter (LoRA) and not a model: merge it into its base model first, with peft's merge_and_unload() "
            "and save_pretrained()."
        )
    if "model_index.json" in names:
        return "it is a diffusers pipeline and not a language model."
    if gguf := _ending(names, (".gguf",)):
        read = READ_AND_SAVE.format(arguments=f"FOLDER, gguf_file={gguf!r}")
        return f"it holds a GGUF file, and slimqwen reads safetensors only: take the original model, or write it with {read}."
    if pickle := _ending(names, PICKLES):
        read = READ_AND_SAVE.format(arguments="FOLDER")
        return (
            f"it holds {shown(pickle)}, a pickle that could run code, and slimqwen reads safetensors only: if you trust it, "
            f"write it again with {read}."
        )
    if other := _ending(names, OTHER_FRAMEWORKS):
        return f"it holds {shown(other)} of another framework, and slimqwen reads safetensors only."
    if links := [name for name in sorted(names) if (folder / name).is_symlink() and not (folder / name).exists()]:
        return f"its {shown(links[0])} is a link to nothing: download the model again."
    if weights := _ending(names, (".safetensors",)):
        if CONFIG not in names:
            return f"it holds weights ({shown(weights)}) alone: put the model's {CONFIG} beside them."
        return f"it holds {shown(weights)}, which is no name that weights have: download the model's index too."
    below = [name for name in sorted(names) if (folder / name / CONFIG).is_file()]
    below += [name for name in sorted(names) if name.startswith("models--")]
    return f"it holds checkpoints: give one of them, such as {folder / below[0]}." if below else None


def _ending(names: Iterable[str], suffixes: tuple[str, ...]) -> str | None:
    return next((name for name in sorted(names) if name.lower().endswith(suffixes)), None)


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return stream.readline(256).strip()
    except OSError:
        return ""
