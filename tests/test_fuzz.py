"""Damaged checkpoints by the hundred: each is read, checked and pruned as if nothing were wrong, or refused in one sentence."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from settings import paper
from test_checkpoint import sharded
from test_cli import slimqwen as run_command
from tiny import fused, write_tiny_checkpoint
from tiny_families import FAMILIES_NATIVE

from slimqwen.checkpoint.config import read_config
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.families.count import count
from slimqwen.planning.experts import ExpertGroup
from slimqwen.planning.plan import Plan, Scores
from slimqwen.pruning.prune import prune
from slimqwen.serving.check import check_checkpoint
from slimqwen.shapes.target import shape_of

CASES_OF_A_KIND = 24
SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 2,
    "moe_intermediate_size": 4,
    "shared_expert_intermediate_size": 4,
}
INDEX = "model.safetensors.index.json"
NASTY: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    -0.0,
    3,
    10**9,
    2**31,
    2**63,
    10**30,
    10**4200,
    float("nan"),
    float("-inf"),
    "",
    "2",
    "..",
    "\ud800",
    "a\nb\0",
    "x" * 100_000,
    [],
    [1, "a", None],
    [[]],
    {},
    {"a": {}},
    {"quantization_config": {"bits": 4}},
    {"rope_type": "yarn", "factor": "x"},
    {"rope_type": ["yarn"]},
    "flash_attention_2",
]


KEYS = ["attention_bias", "mlp_only_layers", "layer_types", "rope_scaling", "dtype", "torch_dtype", "auto_map"]
KEYS += ["_attn_implementation", "quantization_config", "attention_dropout", "hidden_act", "architectures"]


def nasty(chance: random.Random) -> Any:
    return deepcopy(chance.choice(NASTY))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few kilobytes in three shards, experts fused but for the MTP module's; read-only."""
    folder = tmp_path_factory.mktemp("fuzz")
    single = write_tiny_checkpoint(folder / "single", dtype=torch.bfloat16, **SIZES)
    tensors = load_file(single / "model.safetensors")
    mtp = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    tensors = fused({name: tensor for name, tensor in tensors.items() if name not in mtp}, SIZES) | mtp
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    return sharded(single, folder / "shards", shard_bytes=sum(tensor.nbytes for tensor in tensors.values()) // 3)


@pytest.fixture(scope="module")
def everything(healthy: Path) -> Plan:
    return keep_everything(Checkpoint(healthy))


def keep_everything(source: Checkpoint) -> Plan:
    """The plan that keeps all of a checkpoint."""
    counts = count(source.family, source.config)
    experts = range(source.config["num_experts"])
    return Plan(
        checkpoint=source.fingerprint(),
        statistics_data="",
        target=shape_of(source.family, source.config),
        pruning=paper(),
        kept_layers=list(range(source.config["num_hidden_layers"])),
        kept={"hidden": list(range(source.config["hidden_size"]))},
        expert_groups={
            block.name: [ExpertGroup(base=e, members=[e], weights=[1.0]) for e in experts]
            for block in source.family.moe_blocks(source.config)
        },
        before=counts,
        after=counts,
        scores=Scores(layer_similarity=[], layer_block_influence=[], hidden=[], experts={}),
    )


# --- damage: bytes ----------------------------------------------------------------------------------------------------


def flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def shortened(data: bytes, chance: random.Random) -> bytes:
    begin = chance.randrange(len(data))
    return data[:begin] + data[begin + chance.choice([1, 1, 4, 50, len(data)]) :]


def lengthened(data: bytes, chance: random.Random) -> bytes:
    begin = chance.randrange(len(data) + 1)
    more = chance.choice([b"0", b"-", b'"', b"{", b"\0", b"[" * 5000, b"\xff\xfe", chance.randbytes(9)])
    return data[:begin] + more + data[begin:]


def with_another_digit(data: bytes, chance: random.Random) -> bytes:
    digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    place = chance.choice(digits)
    return data[:place] + chance.choice([b"0", b"7", b"-1", b"99", b"1e3", b"0.5", b"9" * 25]) + data[place + 1 :]


BYTES = (flipped, shortened, lengthened, with_another_digit)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def split(file: Path) -> tuple[bytes, bytes]:
    """(header, data) of a safetensors file."""
    data = file.read_bytes()
    length = 8 + struct.unpack("<Q", data[:8])[0]
    return data[8:length], data[length:]


def join(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def header_bytes(folder: Path, chance: random.Random) -> None:
    """The header changes, and the length before it with it or not."""
    file = chance.choice(shards(folder))
    header, data = split(file)
    changed = chance.choice(BYTES)(header, chance)
    file.write_bytes(join(changed, data) if chance.random() < 0.7 else struct.pack("<Q", len(header)) + changed + data)


def header_length(folder: Path, chance: random.Random) -> None:
    file = chance.choice(shards(folder))
    size = file.stat().st_size
    lengths = [0, 1, size - 8, size, 2**31, 2**63, 2**64 - 1, chance.randrange(size), 99_999_999]
    file.write_bytes(struct.pack("<Q", chance.choice(lengths)) + file.read_bytes()[8:])


def weight_bytes(folder: Path, chance: random.Random) -> None:
    """What lies behind the header."""
    file = chance.choice(shards(folder))
    header, data = split(file)
    file.write_bytes(join(header, chance.choice([flipped, flipped, flipped, shortened, lengthened])(data, chance)))


def index_bytes(folder: Path, chance: random.Random) -> None:
    (folder / INDEX).write_bytes(chance.choice(BYTES)((folder / INDEX).read_bytes(), chance))


def config_bytes(folder: Path, chance: random.Random) -> None:
    (folder / "config.json").write_bytes(chance.choice(BYTES)((folder / "config.json").read_bytes(), chance))


# --- damage: meaning --------------------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))  # NaN and infinity as Python writes them


def edit_header(file: Path, change: Callable[[Any], None]) -> None:
    header, data = split(file)
    value = json.loads(header)
    change(value)
    file.write_bytes(join(json.dumps(value).encode(), data))


def described_otherwise(folder: Path, chance: random.Random) -> None:
    """One tensor's dtype, shape or offsets, or all that is said of it."""

    def change(header: Any) -> None:
        entry = header[chance.choice([name for name in header if name != "__metadata__"])]
        key = chance.choice(["dtype", "shape", "data_offsets"])
        match chance.randrange(6):
            case 0:
                entry[key] = nasty(chance)
            case 1:
                entry["dtype"] = chance.choice(["BF16", "F16", "F64", "I32", "U8", "F8_E4M3", "F8_E5M2", "BOOL", "Q4"])
            case 2:
                entry["shape"][chance.randrange(len(entry["shape"]))] = nasty(chance)
            case 3:
                entry["data_offsets"][chance.randrange(2)] = nasty(chance)
            case 4:
                entry["shape"] = chance.choice([entry["shape"][::-1], [*entry["shape"], 1], [], [0], [1] * 100])
            case 5:
                del entry[key]

    edit_header(chance.choice(shards(folder)), change)


def tensors_elsewhere(folder: Path, chance: random.Random) -> None:
    """Tensors missing, added, renamed, doubled or moved, all in files that safetensors itself wrote."""
    one, other = chance.sample(shards(folder), 2)
    here, there = load_file(one), load_file(other)
    name = chance.choice(sorted(here))
    names = [name + "x", "x" * 100_000, "a\nb", "", "mtp.layers.1.mlp.gate.weight", name.replace("0", "2")]
    match chance.randrange(6):
        case 0:
            del here[name]
        case 1:
            here[chance.choice([*names, name + "_scale_inv"])] = torch.ones(2)
        case 2:
            here[chance.choice(names)] = here.pop(name)
        case 3:
            there[name] = here[name].clone()
        case 4:
            there[name] = here.pop(name)
        case 5:
            dtype = chance.choice([torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int64])
            here[name] = here[name].to(dtype)
    save_file(here, one)
    save_file(there, other)


def header_twins(folder: Path, chance: random.Random) -> None:
    """A name given twice in one header, which a mapping would hide."""
    file = chance.choice(shards(folder))
    header, data = split(file)
    name, entry = chance.choice([item for item in json.loads(header).items() if item[0] != "__metadata__"])
    file.write_bytes(join(header.rstrip()[:-1] + f',"{name}":{json.dumps(entry)}}}'.encode(), data))


def index_entries(folder: Path, chance: random.Random) -> None:
    def change(index: Any) -> None:
        places = index["weight_map"]
        name = chance.choice(sorted(places))
        escapes = ["../shards/model.safetensors", "..", ".", "/etc/passwd", "/dev/zero", str(folder / places[name])]
        escapes += ["a/../" + places[name], "./" + places[name], "x.safetensors", places[name] + "\0", "y" * 5000]
        match chance.randrange(6):
            case 0:
                places[name] = chance.choice(escapes)
            case 1:
                places[name] = nasty(chance)
            case 2:
                places[name] = chance.choice(sorted(set(places.values()) - {places[name]}))
            case 3:
                del places[name]
            case 4:
                places[chance.choice(["model.layers.7.mlp.gate.weight", "", "a\nb"])] = places[name]
            case 5:
                index[chance.choice(["weight_map", "metadata"])] = nasty(chance)

    edit(folder / INDEX, change)


def files_elsewhere(folder: Path, chance: random.Random) -> None:
    one, other = chance.sample(shards(folder), 2)
    match chance.randrange(8):
        case 0:
            one.unlink()
        case 1:
            one.rename(folder / chance.choice(["weights.safetensors", "model.safetensors", one.name.upper()]))
        case 2:
            content = one.read_bytes()
            one.write_bytes(other.read_bytes())
            other.write_bytes(content)
        case 3:
            one.write_bytes(chance.choice([b"", b"{}", bytes(8), bytes(100), join(b"{}", b"")]))
        case 4:
            one.unlink()
            one.mkdir()
        case 5:
            shutil.copy(one, folder / chance.choice(["model.safetensors", "more.safetensors"]))
        case 6:
            one.unlink()
            one.symlink_to(chance.choice([one, folder / "nowhere", other, folder, Path("/dev/zero")]))
        case 7:
            file = folder / chance.choice(["config.json", INDEX])
            file.unlink()
            if chance.random() < 0.5:
                file.mkdir()


def config_values(folder: Path, chance: random.Random) -> None:
    def change(config: Any) -> None:
        for _ in range(chance.choice([1, 1, 2])):
            section = chance.choice([config, config, *(value for value in config.values() if isinstance(value, dict))])
            key = chance.choice([*sorted(section), *KEYS])
            if chance.random() < 0.15:
                section.pop(key, None)
            else:
                section[key] = nasty(chance)

    edit(folder / "config.json", change)


def config_of_another_model(folder: Path, chance: random.Random) -> None:
    """Sane values that the weights do not have."""

    def change(config: Any) -> None:
        key = chance.choice([*SIZES, "num_nextn_predict_layers", "num_mtp_layers", "tie_word_embeddings", "model_type"])
        value = config[key]
        if isinstance(value, list):
            config[key] = chance.choice([value[::-1], value[:1], value * 2, ["full_attention"] * 2, ["none"] * 2])
        elif isinstance(value, str):
            config[key] = chance.choice(["llama", "qwen3_nxt", "qwen3_moe", "mixtral"])
        else:
            config[key] = chance.choice([1 - value, value + 1, value * 2, value * 1000])

    edit(folder / "config.json", change)


KINDS = {
    damage.__name__: damage
    for damage in (
        header_bytes,
        header_length,
        weight_bytes,
        index_bytes,
        config_bytes,
        described_otherwise,
        tensors_elsewhere,
        header_twins,
        index_entries,
        files_elsewhere,
        config_values,
        config_of_another_model,
    )
}
ROUNDS = {"header_bytes": 5, "index_bytes": 3, "config_bytes": 2, "config_values": 5, "described_otherwise": 3}


# --- what must come of it ---------------------------------------------------------------------------------------------


def refusal(work: Callable[[], object]) -> str | None:
    """The sentence with which a piece of work refuses; None where it succeeds."""
    try:
        work()
    except UserError as error:
        return str(error)
    return None


def plan_of(everything: Plan, folder: Path) -> Plan:
    """The plan that keeps everything, of this checkpoint."""
    return everything.model_copy(update={"checkpoint": Checkpoint(folder).fingerprint()})


def check_case(folder: Path, everything: Plan, case: str) -> bool:
    """True where the folder was refused. A checkpoint that `check` takes is pruned, and keeps every byte."""
    out = folder.parent / "out"
    try:
        checked = refusal(lambda: check_checkpoint(folder))
        pruned = refusal(lambda: prune(folder, out, plan=plan_of(everything, folder)))
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    for sentence in filter(None, (checked, pruned)):
        assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 1000, f"{case}: {sentence!r}"
        assert folder.parent.name in sentence, f"{case} does not say where: {sentence}"
    if pruned is None:
        source, written = Checkpoint(folder), Checkpoint(out)
        assert written.specs.keys() == source.specs.keys(), case
        for name in source.specs:
            same = source.read(name).view(torch.uint8), written.read(name).view(torch.uint8)
            assert torch.equal(*same), f"{case}: {name}"
    else:
        assert not out.exists(), f"{case} left {out}"
        assert checked is not None or "the plan does not fit" in pruned, f"{case}: {pruned}"
    return pruned is not None


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_in_one_sentence_or_does_no_harm(
    healthy: Path, everything: Plan, tmp_path: Path, kind: str
) -> None:
    refused = 0
    cases = CASES_OF_A_KIND * ROUNDS.get(kind, 1)
    for number in range(cases):
        folder = Path(shutil.copytree(healthy, tmp_path / str(number) / "checkpoint"))
        KINDS[kind](folder, random.Random(f"{kind} {number}"))
        refused += check_case(folder, everything, f"{kind} {number}")
        shutil.rmtree(folder.parent, ignore_errors=True)
    assert refused > 0
    if kind in ("header_twins", "tensors_elsewhere"):
        assert refused == cases
    if kind in ("weight_bytes", "config_values"):
        assert refused < cases  # a number of another value is no damage that anyone could see


def test_there_are_enough_cases() -> None:
    assert sum(CASES_OF_A_KIND * ROUNDS.get(kind, 1) for kind in KINDS) >= 500


def test_undamaged(healthy: Path, everything: Plan, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy, tmp_path / "checkpoint"))
    assert not check_case(folder, everything, "undamaged")


@pytest.mark.parametrize("family", FAMILIES_NATIVE)
def test_a_damaged_config_of_any_family(tmp_path: Path, family: str) -> None:
    path = tmp_path / "config.json"
    refused = 0
    for number in range(CASES_OF_A_KIND):
        path.write_text(json.dumps(FAMILIES_NATIVE[family]))
        config_values(tmp_path, random.Random(f"{family} {number}"))
        sentence = refusal(lambda: count(*read_config(path)))
        refused += sentence is not None
        assert sentence is None or ("\n" not in sentence and str(path) in sentence), f"{number}: {sentence}"
    assert 0 < refused < CASES_OF_A_KIND


@pytest.mark.parametrize("kind", ["header_length", "index_entries", "config_of_another_model"])
def test_the_commands_say_it_too(healthy: Path, everything: Plan, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(healthy, tmp_path / "checkpoint"))
    KINDS[kind](folder, random.Random(0))
    everything.save(tmp_path / "plan.json")
    for command in (["check", folder], ["prune", folder, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out"]):
        result = run_command(*command)
        assert result.returncode == 2, result
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result
        assert not result.stdout
    assert not (tmp_path / "out").exists()
