"""Explanations for folders that are not checkpoints: what they are, and how to get a checkpoint from them."""

from collections.abc import Iterable
from pathlib import Path

from slimqwen.core.errors import UserError, shown

READ_AND_SAVE = "AutoModelForCausalLM.from_pretrained({arguments}).save_pretrained(FOLDER)"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHER_FRAMEWORKS = (".h5", ".msgpack", ".onnx")
MOST_ENTRIES = 10_000  # of a folder that are examined
CONFIG = "config.json"


def snapshot_of(folder: Path) -> Path:
    """Find the snapshot in the root of a model's cache (`models--org--name`, in the hub's layout); else return `folder`.

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


def explain_folder(folder: Path) -> str | None:
    """Explain what a folder without a checkpoint's files is, and what to do; None where nothing is recognised."""
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
    if gguf := _first_with_suffix(names, (".gguf",)):
        read = READ_AND_SAVE.format(arguments=f"FOLDER, gguf_file={gguf!r}")
        return f"it holds a GGUF file, and slimqwen reads safetensors only: use the original model, or convert it with {read}."
    if pickle := _first_with_suffix(names, PICKLES):
        read = READ_AND_SAVE.format(arguments="FOLDER")
        return (
            f"it holds {shown(pickle)}, a pickle that could run code, and slimqwen reads safetensors only: if you trust it, "
            f"convert it with {read}."
        )
    if other := _first_with_suffix(names, OTHER_FRAMEWORKS):
        return f"it holds {shown(other)} of another framework, and slimqwen reads safetensors only."
    if links := [name for name in sorted(names) if (folder / name).is_symlink() and not (folder / name).exists()]:
        return f"its {shown(links[0])} is a link to nothing: download the model again."
    if weights := _first_with_suffix(names, (".safetensors",)):
        if CONFIG not in names:
            return f"it holds only weights ({shown(weights)}): put the model's {CONFIG} beside them."
        return f"it holds {shown(weights)}, which is not a usual name for weights: download the model's index too."
    checkpoints = [name for name in sorted(names) if (folder / name / CONFIG).is_file()]
    checkpoints += [name for name in sorted(names) if name.startswith("models--")]
    return f"it holds checkpoints: give one of them, such as {folder / checkpoints[0]}." if checkpoints else None


def _first_with_suffix(names: Iterable[str], suffixes: tuple[str, ...]) -> str | None:
    return next((name for name in sorted(names) if name.lower().endswith(suffixes)), None)


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return stream.readline(256).strip()
    except OSError:
        return ""
