"""The streaming prune: to the bit what plain indexing gives, in every layout, dtype and shard size, killed or not."""

import importlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, run_ranks
from safetensors.torch import load_file, save_file
from settings import paper
from tiny import QWEN3_NEXT, tiny_tokens, write_tiny_checkpoint
from torch import Tensor
from typer.testing import CliRunner

from slimqwen.artifacts import MARKER
from slimqwen.checkpoint.reader import INDEX_FILE, Checkpoint
from slimqwen.checkpoint.shards import TensorInfo, plan_shards
from slimqwen.checkpoint.writer import CheckpointWriter
from slimqwen.cli import app
from slimqwen.core.errors import UserError
from slimqwen.core.torchrun import rank
from slimqwen.families.count import count
from slimqwen.families.family import Layout
from slimqwen.model.model import load
from slimqwen.planning.choose import Scores
from slimqwen.planning.experts import ExpertGroup
from slimqwen.planning.plan import Plan
from slimqwen.pruning import prune as prune_stage
from slimqwen.pruning import read_ahead, stream
from slimqwen.pruning.cut import Cut
from slimqwen.pruning.prune import prune
from slimqwen.recipe import Target
from slimqwen.shapes.target import completed

EXPERTS, NEURONS, HIDDEN = 8, 16, 32
KEPT_LAYERS = [1, 2, 3]
MOE_BLOCKS = [*(f"model.layers.{layer}" for layer in KEPT_LAYERS), "mtp.layers.0"]
TARGET = Target(num_hidden_layers=3, hidden_size=24, num_experts=3, num_experts_per_tok=1, moe_intermediate_size=12)
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("streaming") / "source", dtype=torch.bfloat16)


def a_plan(source: Path) -> Plan:
    """Layers 4 -> 3, hidden 32 -> 24, experts 8 -> 3 of which two are means, neurons 16 -> 12, others in each expert."""
    checkpoint = Checkpoint(source)
    config = checkpoint.config
    generator = torch.Generator().manual_seed(1)

    def chosen(size: int, keep: int) -> list[int]:
        return sorted(torch.randperm(size, generator=generator)[:keep].tolist())

    groups = [
        ExpertGroup(base=5, members=[5, 0, 7], weights=[0.5, 0.3, 0.2]),
        ExpertGroup(base=2, members=[2], weights=[1.0]),
        ExpertGroup(base=6, members=[6, 1], weights=[0.9, 0.1]),
    ]
    return Plan(
        checkpoint=checkpoint.fingerprint(),
        statistics_data="none",
        target=completed(checkpoint.family, TARGET, config),
        pruning=paper(),
        kept_layers=KEPT_LAYERS,
        kept={
            "hidden": chosen(HIDDEN, 24),
            "expert_neuron": {block: [chosen(NEURONS, 12) for _ in range(EXPERTS)] for block in MOE_BLOCKS},
        },
        expert_groups={block: groups[i % 3 :] + groups[: i % 3] for i, block in enumerate(MOE_BLOCKS)},
        before=count(checkpoint.family, config),
        after=count(checkpoint.family, config),
        scores=Scores(layer_similarity=[], layer_block_influence=[], hidden=[], experts={}),
    )


def rewritten(source: Path, out: Path, stacked_blocks: list[str], shard_bytes: int | None = None) -> Path:
    """The same checkpoint with the experts of these blocks stacked, in one file or in shards."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    for block in stacked_blocks:
        tensors |= stack(tensors, f"{block}.mlp.experts.")
    (out / "model.safetensors").unlink()
    infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    files = {}
    for shard in plan_shards(infos, shard_bytes or 1 << 40):
        save_file({t.name: tensors[t.name] for t in shard.tensors}, out / shard.file, metadata={"format": "pt"})
        files |= {tensor.name: shard.file for tensor in shard.tensors}
    if shard_bytes:
        (out / INDEX_FILE).write_text(json.dumps({"weight_map": files}))
    return out


def stack(tensors: Tensors, prefix: str) -> Tensors:
    """Take a block's expert tensors out of `tensors`; the same two stacked."""
    experts = range(1 + max(int(n.removeprefix(prefix).split(".")[0]) for n in tensors if n.startswith(prefix)))
    gate, up, down = (
        [tensors.pop(f"{prefix}{e}.{projection}.weight") for e in experts]
        for projection in ("gate_proj", "up_proj", "down_proj")
    )
    pairs = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    return {f"{prefix}gate_up_proj": torch.stack(pairs), f"{prefix}down_proj": torch.stack(down)}


def held(folder: Path) -> Tensors:
    """All tensors of a checkpoint, every block's experts stacked."""
    tensors: Tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    for block in {name.split("experts.")[0] + "experts." for name in tensors if ".mlp.experts.0." in name}:
        tensors |= stack(tensors, block)
    return tensors


def sliced_in_memory(tensors: Tensors, plan: Plan) -> Tensors:
    """The referee: the cut of stacked tensors by plain indexing, all in memory, no axis table."""
    h = torch.tensor(plan.kept["hidden"])
    result = {name: tensors[name][:, h] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for name in ("model.norm", "mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"):
        result[f"{name}.weight"] = tensors[f"{name}.weight"][h]
    result["mtp.fc.weight"] = tensors["mtp.fc.weight"][h][:, torch.cat([h, HIDDEN + h])]
    new_names = {f"model.layers.{old}": f"model.layers.{new}" for new, old in enumerate(plan.kept_layers)}
    for old, new in (new_names | {"mtp.layers.0": "mtp.layers.0"}).items():
        groups = plan.expert_groups[old]
        units = plan.kept["expert_neuron"]
        assert isinstance(units, dict)
        for name in [name for name in tensors if name.startswith(old + ".")]:
            tensor, kind = tensors[name], name.removeprefix(old + ".")
            if kind.startswith("mlp.experts."):
                tensor = torch.stack([mean(tensor, group) for group in groups])
                cuts = []
                for expert, group in zip(tensor, groups, strict=True):
                    n = torch.tensor(units[old][group.base])
                    gate_up = kind.endswith("gate_up_proj")
                    cuts.append(expert[torch.cat([n, NEURONS + n])][:, h] if gate_up else expert[h][:, n])
                tensor = torch.stack(cuts)
            elif kind == "mlp.gate.weight":
                tensor = tensor[[group.base for group in groups]][:, h]
            elif kind.endswith(
                ("layernorm.weight", "out_proj.weight", "o_proj.weight", "shared_expert.down_proj.weight")
            ):
                tensor = tensor[h]
            elif "_proj" in kind or kind == "mlp.shared_expert_gate.weight":
                tensor = tensor[:, h]
            result[name.replace(old, new, 1)] = tensor
    return result


def mean(experts: Tensor, group: ExpertGroup) -> Tensor:
    """In float32, rounded once."""
    if len(group.members) == 1:
        return experts[group.base]
    total = torch.zeros(experts.shape[1:])
    for member, weight in zip(group.members, group.weights, strict=True):
        total = total + weight * experts[member].float()
    return total.to(experts.dtype)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != MARKER}


# --- to the bit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", [None, "per_expert", "fused"])
@pytest.mark.parametrize(
    ("stacked_blocks", "shard_bytes"),
    [([], None), (["model.layers.0", "model.layers.1", "model.layers.2", "model.layers.3"], 30_000)],
    ids=["per expert, one file", "trunk stacked and MTP per expert, shards"],
)
def test_streamed_is_sliced_in_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    layout: Layout | None,
    stacked_blocks: list[str],
    shard_bytes: int | None,
) -> None:
    monkeypatch.setattr(stream, "PIECE_BYTES", 700)  # most tensors come in several pieces
    monkeypatch.setattr("slimqwen.pruning.cut.MERGED_AT_ONCE", 100)
    plain = write_tiny_checkpoint(tmp_path / "plain", dtype=dtype)
    source = rewritten(plain, tmp_path / "source", stacked_blocks, shard_bytes)
    plan = a_plan(source)
    out = prune(source, tmp_path / "out", plan=plan, layout=layout, shard_bytes=20_000)

    expected, found = sliced_in_memory(held(source), plan), held(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == (torch.float32 if name.endswith("A_log") else dtype), name
        assert torch.equal(found[name], tensor), name
    trunk, mtp = ("fused", "per_expert") if stacked_blocks else ("per_expert", "per_expert")
    layouts = Checkpoint(out).layouts
    assert layouts == {f"model.layers.{i}": layout or trunk for i in range(3)} | {"mtp.layers.0": layout or mtp}


@pytest.mark.parametrize("shard_bytes", [1, 5_000, 40_000, 10**9])
@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_files_are_those_that_safetensors_writes(
    tmp_path: Path, source: Path, layout: Layout, shard_bytes: int
) -> None:
    out = prune(source, tmp_path / "out", plan=a_plan(source), layout=layout, shard_bytes=shard_bytes)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2 or shard_bytes == 10**9
    for file in shards:
        tensors = load_file(file)
        save_file(tensors, tmp_path / "again", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "again").read_bytes()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= shard_bytes
    if len(shards) > 1:
        index = json.loads((out / INDEX_FILE).read_text())
        assert index["weight_map"] == {name: file.name for file in shards for name in load_file(file)}
        assert index["metadata"]["total_size"] == sum(t.nbytes for file in shards for t in load_file(file).values())


@pytest.mark.parametrize("there", ["per_expert", "fused"])
def test_a_layout_there_and_back_is_the_identity(tmp_path: Path, source: Path, there: Layout) -> None:
    back: Layout = "fused" if there == "per_expert" else "per_expert"
    whole = list(range(4))
    folders = [source]
    for name, layout in (("start", back), ("there", there), ("back", back)):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        Cut(Checkpoint(folders[-2]), whole, {}, {}, layout=layout).write(folders[-1], "test")
    _, start, middle, end = folders
    assert files_of(start) == files_of(end) != files_of(middle)


def test_experts_of_unlike_dtypes_are_not_stacked(tmp_path: Path, source: Path) -> None:
    unlike = tmp_path / "unlike"
    shutil.copytree(source, unlike)
    tensors = load_file(unlike / "model.safetensors")
    name = "model.layers.2.mlp.experts.2.up_proj.weight"
    tensors[name] = tensors[name].float()
    save_file(tensors, unlike / "model.safetensors", metadata={"format": "pt"})
    plan = a_plan(unlike)
    with pytest.raises(
        UserError, match=r"layers.2.mlp.experts.2.up_proj.weight' is float32.* keep the layout per_expert"
    ):
        prune(unlike, tmp_path / "out", plan=plan, layout="fused")
    prune(unlike, tmp_path / "out", plan=plan)  # each tensor keeps its own
    place = [group.base for group in plan.expert_groups["model.layers.2"]].index(2)
    assert Checkpoint(tmp_path / "out").dtype(f"model.layers.1.mlp.experts.{place}.up_proj.weight") == torch.float32


# --- interrupted ------------------------------------------------------------------------------------------------------

SHARD_BYTES = 8_000


def interrupted_after(monkeypatch: pytest.MonkeyPatch, pieces: int) -> list[str]:
    """Raise KeyboardInterrupt where one piece more is to be written; the tensors that pieces were written of."""
    written: list[str] = []
    original = CheckpointWriter.add
    lock = threading.Lock()

    def add(self: CheckpointWriter, name: str, rows: Tensor, first_row: int = 0) -> None:
        with lock:
            if len(written) == pieces:
                raise KeyboardInterrupt
            written.append(name)
        original(self, name, rows, first_row)

    monkeypatch.setattr(CheckpointWriter, "add", add)
    return written


@pytest.mark.parametrize("pieces", [0, 60, 150])
def test_interrupted_and_continued_is_uninterrupted(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pieces: int
) -> None:
    plan = a_plan(source)
    prune(source, tmp_path / "whole", plan=plan, shard_bytes=SHARD_BYTES)
    partial = tmp_path / ".out.partial"
    monkeypatch.setattr(stream, "PIECE_BYTES", 1_000)
    with monkeypatch.context() as patch:
        interrupted_after(patch, pieces)
        with pytest.raises(KeyboardInterrupt):
            prune(source, tmp_path / "out", plan=plan, shard_bytes=SHARD_BYTES)
    assert not (tmp_path / "out").exists()
    finished = sorted(partial.glob("*.safetensors"))
    assert bool(finished) == partial.exists() == bool(pieces)
    assert not list(tmp_path.glob("*/.model*")), "what is not complete must not stay"
    inodes = {file.name: file.stat().st_ino for file in finished}
    assert ("the same command continues" in capsys.readouterr().err) == bool(pieces)

    written = interrupted_after(monkeypatch, 10**9)
    prune(source, tmp_path / "out", plan=plan, shard_bytes=SHARD_BYTES)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in inodes} == inodes
    assert not {name for file in finished for name in load_file(tmp_path / "out" / file.name)} & set(written)
    assert not partial.exists()


def test_killed_and_continued_is_uninterrupted(tmp_path: Path, source: Path) -> None:
    """A real SIGKILL, in the middle of a shard, when others are complete."""
    plan = a_plan(source)
    plan.save(tmp_path / "plan.json")
    prune(source, tmp_path / "whole", plan=plan, shard_bytes=SHARD_BYTES)
    partial = tmp_path / ".out.partial"
    script = f"""
import os, signal, time
from pathlib import Path
from slimqwen.checkpoint.writer import CheckpointWriter
from slimqwen.pruning.prune import prune
added, add = [], CheckpointWriter.add
def add_and_die(self, name, rows, first_row=0):
    add(self, name, rows[:1] if len(added) == 50 else rows, first_row)
    added.append(name)
    while len(added) > 50:
        if list(Path({str(partial)!r}).glob("model*")):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
CheckpointWriter.add = add_and_die
prune(Path({str(source)!r}), Path({str(tmp_path / "out")!r}), plan=Path({str(tmp_path / "plan.json")!r}), shard_bytes={SHARD_BYTES})
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(partial.glob("model*")) and list(partial.glob(".model*.partial")) and not (tmp_path / "out").exists()
    inodes = {file.name: file.stat().st_ino for file in partial.glob("model*")}
    prune(source, tmp_path / "out", plan=tmp_path / "plan.json", shard_bytes=SHARD_BYTES)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in inodes} == inodes


def prune_and_end(source: Path, out: Path, ended_after: int | None = None) -> None:
    """Prune on every rank; the second ends without a word where it would write one shard more."""
    if rank() == 1 and ended_after is not None:
        original, begun = CheckpointWriter.add, set()

        def add_or_end(self: CheckpointWriter, name: str, rows: Tensor, first_row: int = 0) -> None:
            begun.add(self._places[name][0])
            if len(begun) > ended_after:
                self.complete()
                os._exit(9)
            original(self, name, rows, first_row)

        CheckpointWriter.add = add_or_end  # type: ignore[method-assign]
    prune(source, out, plan=source.with_name("plan.json"), shard_bytes=SHARD_BYTES)


def test_ranks_write_shards_of_their_own_and_the_bytes_of_one(tmp_path: Path, source: Path) -> None:
    """One of two is lost; three continue, then one of them has nothing to write."""
    a_plan(source).save(source.with_name("plan.json"))
    prune_and_end(source, tmp_path / "one")
    codes, said = Ranks(2, prune_and_end, source, tmp_path / "out", 1).end()
    assert codes == [1, 9] and not (tmp_path / "out").exists(), said
    finished = {file.name: file.stat().st_ino for file in (tmp_path / ".out.partial").glob("model-*")}
    assert len(finished) >= 2 and len(finished) < len(list((tmp_path / "one").glob("model-*"))), said
    run_ranks(3, prune_and_end, source, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in finished} == finished


@pytest.mark.parametrize("other", ["plan", "layout", "shard_bytes", "source"])
def test_the_remains_of_other_work_are_not_used(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    with monkeypatch.context() as patch:
        interrupted_after(patch, 50)
        with pytest.raises(KeyboardInterrupt):
            prune(source, tmp_path / "out", plan=a_plan(source), shard_bytes=SHARD_BYTES)
    assert list((tmp_path / ".out.partial").glob("model*"))
    capsys.readouterr()

    layout: Layout | None = "fused" if other == "layout" else None
    shard_bytes = SHARD_BYTES + (other == "shard_bytes")
    if other == "source":
        source = write_tiny_checkpoint(tmp_path / "other", seed=1, dtype=torch.bfloat16)
    plan = a_plan(source)
    if other == "plan":
        plan = plan.model_copy(update={"kept": plan.kept | {"hidden": list(range(24))}})
    prune(source, tmp_path / "out", plan=plan, layout=layout, shard_bytes=shard_bytes)
    assert "left behind by other work" in capsys.readouterr().err
    prune(source, tmp_path / "fresh", plan=plan, layout=layout, shard_bytes=shard_bytes)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_a_finished_shard_that_was_damaged_is_noticed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate makes a tensor of every shard once more."""
    plan = a_plan(source)
    with monkeypatch.context() as patch:
        interrupted_after(patch, 50)
        with pytest.raises(KeyboardInterrupt):
            prune(source, tmp_path / "out", plan=plan, shard_bytes=SHARD_BYTES)
    shard = next((tmp_path / ".out.partial").glob("model*"))
    bytes_of_zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(shard).items()}
    save_file(bytes_of_zeros, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not what was written"):
        prune(source, tmp_path / "out", plan=plan, shard_bytes=SHARD_BYTES)
    assert not (tmp_path / "out").exists()


# --- memory and disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_no_more_than_a_piece_for_each_worker_is_in_memory(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    piece_bytes = 400
    monkeypatch.setattr(stream, "PIECE_BYTES", piece_bytes)
    original = Cut.rows
    alive, most, sizes = 0, 0, []
    lock = threading.Lock()

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def rows(self: Cut, piece: stream.Piece) -> Tensor:
        nonlocal alive, most
        made = original(self, piece)
        sizes.append(made.nbytes)
        with lock:
            alive += 1
            most = max(most, alive)
        weakref.finalize(made, gone)
        return made

    plan = a_plan(source)
    cut = Cut(Checkpoint(source), plan.kept_layers, plan.kept, plan.expert_groups, layout=layout)
    monkeypatch.setattr(Cut, "rows", rows)
    (tmp_path / "out").mkdir()
    cut.write(tmp_path / "out", "test")
    assert 1 <= most <= stream.WORKERS
    assert max(sizes) <= piece_bytes < max(tensor.nbytes for tensor in cut.tensors)
    assert len(sizes) > len(cut.tensors)


def test_too_small_a_disk_is_refused_before_anything_is_written(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = a_plan(source)
    whole = prune(source, tmp_path / "whole", plan=plan, shard_bytes=SHARD_BYTES)
    needed = sum(file.stat().st_size for file in whole.glob("*.safetensors"))
    usage = namedtuple("usage", "total used free")

    def disk(free: int) -> None:
        monkeypatch.setattr(prune_stage.shutil, "disk_usage", lambda _: usage(0, 0, free))

    capsys.readouterr()
    disk(needed - 1)
    with pytest.raises(UserError, match=r"kB are to be written to .* kB are free: make room"):
        prune(source, tmp_path / "out", plan=plan, shard_bytes=SHARD_BYTES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]
    derived = capsys.readouterr().err.splitlines()[0]
    assert (
        f"{len(list(whole.glob('*.safetensors')))} shards" in derived and "of memory" in derived and "free" in derived
    )

    disk(needed)
    with monkeypatch.context() as patch:
        interrupted_after(patch, 50)
        with pytest.raises(KeyboardInterrupt):
            prune(source, tmp_path / "out", plan=plan, shard_bytes=SHARD_BYTES)
    disk(needed - 1)  # what the interrupted one finished need not be written again
    capsys.readouterr()
    prune(source, tmp_path / "out", plan=plan, shard_bytes=SHARD_BYTES)
    assert "are there already" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == files_of(whole)


@pytest.mark.skipif(not read_ahead.MAPPINGS.exists(), reason="the system does not list its mappings")
def test_what_is_read_ahead_is_a_file_and_faults_read_nothing_beside_it(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is found once, whole; memory that is no file's is left alone."""
    advised: list[tuple[int, int, int]] = []
    original = read_ahead._advise
    monkeypatch.setattr(read_ahead, "_advise", lambda *call: (advised.append(call), original(*call))[1])
    ahead, checkpoint = read_ahead.ReadAhead(), Checkpoint(source)
    tensors = [checkpoint.read(name) for name in list(checkpoint.specs)[:3]]
    for tensor in tensors:
        ahead.start(tensor)
    whole = [(first, end) for first, end, advice in advised if advice == mmap.MADV_RANDOM]
    assert len(whole) == 1 and whole[0][1] - whole[0][0] >= (source / "model.safetensors").stat().st_size
    for (first, end, _), tensor in zip([call for call in advised if call[:2] not in whole], tensors, strict=True):
        assert whole[0][0] <= first <= tensor.data_ptr() and end == tensor.data_ptr() + tensor.nbytes <= whole[0][1]
    ahead.start(torch.zeros(100_000))
    assert sum(advice == mmap.MADV_RANDOM for *_, advice in advised) == 1


# --- plans that do not fit --------------------------------------------------------------------------------------------


def without(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: {"kept_layers": [1, 2, 4]}, "kept_layers"),
        (lambda p: {"kept_layers": [1, 2]}, "expert_neuron must have the blocks"),
        (lambda p: {"kept": p.kept | {"hiden": [0]}}, "did you mean 'hidden'"),
        (lambda p: {"kept": p.kept | {"expert": [0]}}, "an axis 'expert'"),
        (lambda p: {"kept": p.kept | {"hidden": [0, 32]}}, "kept.hidden must be different numbers from 0 to 31"),
        (lambda p: {"kept": p.kept | {"hidden": {"model.layers.1": [0]}}}, "kept.hidden must be one list"),
        (
            lambda p: {"kept": p.kept | {"hidden": list(range(20))}},
            "target.hidden_size is 24, and what is kept leaves 20",
        ),
        (lambda p: {"kept": without(p.kept, "expert_neuron")}, "target.moe_intermediate_size is 12"),
        (
            lambda p: {"kept": p.kept | {"expert_neuron": without(p.kept["expert_neuron"], "mtp.layers.0")}},
            "kept.expert_neuron must have the blocks",
        ),
        (
            lambda p: {"kept": p.kept | {"expert_neuron": p.kept["expert_neuron"] | {"mtp.layers.0": [[0] * 12] * 8}}},
            "kept.expert_neuron of mtp.layers.0, list 0, must be different numbers from 0 to 15",
        ),
        (
            lambda p: {
                "kept": p.kept | {"expert_neuron": p.kept["expert_neuron"] | {"mtp.layers.0": [list(range(12))] * 3}}
            },
            "one list for each of 8 units",
        ),
        (
            lambda p: {"kept": p.kept | {"expert_neuron": p.kept["expert_neuron"] | {"mtp.layers.0": list(range(11))}}},
            "keeps 11 units in one place and 12 in another",
        ),
        (lambda p: {"expert_groups": without(p.expert_groups, "mtp.layers.0")}, "expert_groups must have the blocks"),
        (
            lambda p: {"expert_groups": p.expert_groups | {"mtp.layers.0": p.expert_groups["mtp.layers.0"][:2]}},
            "make 2 experts, target.num_experts is 3",
        ),
        (
            lambda p: {
                "expert_groups": p.expert_groups
                | {"mtp.layers.0": [ExpertGroup(base=e, members=[e], weights=[1.0]) for e in (0, 1, 8)]}
            },
            "expert_groups of mtp.layers.0 name experts beyond 7",
        ),
        (lambda p: {"target": p.target.model_copy(update={"num_experts_per_tok": 4})}, "num_experts_per_tok is 4"),
    ],
)
def test_a_plan_that_does_not_fit_is_one_sentence(tmp_path: Path, source: Path, change: Any, words: str) -> None:
    plan = a_plan(source)
    with pytest.raises(UserError) as error:
        prune(source, tmp_path / "out", plan=plan.model_copy(update=change(plan)))
    assert words in str(error.value) and "does not fit" in str(error.value)
    assert not list(tmp_path.iterdir())


# --- the writer -------------------------------------------------------------------------------------------------------


def test_the_writer_takes_rows_in_any_order(tmp_path: Path) -> None:
    """A stacked tensor comes expert by expert, a matrix bottom first; the file is the one of save_file."""
    tensors = {"stacked": torch.arange(24.0).view(2, 3, 4), "matrix": torch.arange(6.0).view(3, 2).half()}
    infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with CheckpointWriter(tmp_path, infos) as writer:
        assert [info.name for info in writer.missing()] == ["stacked", "matrix"]
        writer.add("matrix", tensors["matrix"][1:], first_row=1)
        writer.add("stacked", tensors["stacked"][1], first_row=3)
        writer.add("stacked", tensors["stacked"][0])
        with pytest.raises(AssertionError, match="not every tensor"):
            writer.finish({})
        writer.add("matrix", tensors["matrix"][:1])
        writer.finish({})
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_writer_that_was_left_early_leaves_complete_shards_only(tmp_path: Path) -> None:
    infos = [TensorInfo(name, torch.float32, (4,)) for name in "abc"]
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path, infos, shard_bytes=16) as writer:
        writer.add("a", torch.ones(4))
        writer.add("b", torch.ones(4)[:2])
        raise RuntimeError
    assert {path.name for path in tmp_path.iterdir()} <= {"model-00001-of-00003.safetensors"}


def test_the_command(tmp_path: Path, source: Path) -> None:
    a_plan(source).save(tmp_path / "plan.json")
    command = ["prune", str(source), "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--layout", "fused", "--shard-size", "20kB"], catch_exceptions=False)
    assert result.exit_code == 0 and result.stdout == f"{tmp_path / 'out'}\n"
    assert set(Checkpoint(tmp_path / "out").layouts.values()) == {"fused"}
    assert all(file.stat().st_size < 40_000 for file in (tmp_path / "out").glob("*.safetensors"))
    for wrong, words in (("--layout=fuse", "did you mean 'fused'"), ("--shard-size=big", "is not a size in bytes")):
        with pytest.raises(UserError, match=words):
            CliRunner().invoke(app, [*command, wrong], catch_exceptions=False)


def test_the_benchmark_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its synthetic checkpoint is one that runs, and its numbers are there."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    benchmark = importlib.import_module("prune")
    result = benchmark.measure(tmp_path, QWEN3_NEXT, Target(hidden_size=16, num_experts=4), repeats=1)
    assert result["throughput_over_cp"] > 0 < result["throughput_over_cp_without_merging"]
    assert result["peak_anonymous_bytes"] > 10**8
    assert result["largest_tensor_bytes"] == 300 * 16 * 2 and result["checkpoint_bytes"] > result["written_bytes"]
    for folder in ("source", "pruned"):
        with torch.no_grad():
            hidden = load(tmp_path / folder)(tiny_tokens())
        assert hidden.main.isfinite().all() and hidden.main.std() > 0.1 and hidden.mtp.isfinite().all()
