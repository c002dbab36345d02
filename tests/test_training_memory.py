"""What training is predicted to take, against the tensors that are really alive while it runs: within 15 %, every family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from settings import sections
from tiny import canonical, tiny_config, tiny_stream
from tiny_families import FAMILIES_NATIVE
from torch import Tensor

from slimqwen.checkpoint.config import read_config
from slimqwen.families import FAMILIES, Config
from slimqwen.families.count import count
from slimqwen.families.qwen3_next import QWEN3_NEXT
from slimqwen.model.kernels import BATCHED_EXPERTS
from slimqwen.model.live_bytes import measured_peak
from slimqwen.model.model import MtpCausalLM, initialise
from slimqwen.recipe import DistilRecipe
from slimqwen.shapes.activations import CPU, Precision, saved_bytes
from slimqwen.shapes.training_memory import TrainingMemory, TrainingSettings, measure, pinning_bytes, training_memory
from slimqwen.shapes.weights import MUON_PARTS, weigh
from slimqwen.training.dry_run import held_bytes, predict_memory
from slimqwen.training.optimizer import MUON_PARTS as MUON_PARTS_TRAINED
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import Span, Student, Trainer

AUTOCAST_WITHOUT_FUSED_KERNELS = Precision(compute_bytes=2, casts=True, fused_deltanet=False)
# Options of tiny models that released checkpoints do not use, and that keep copies of their own.
PLAIN: dict[str, Config] = {"mixtral": {"sliding_window": None}, "olmoe": {"clip_qkv": None}}
LANGUAGE = [name for name in FAMILIES_NATIVE if name != "qwen3_5_moe"]  # the vision tower is not trained


# --- the meter itself -------------------------------------------------------------------------------------------------


def test_the_meter_counts_what_is_alive_at_one_time() -> None:
    before = torch.ones(1000)
    with measured_peak(torch.device("cpu")) as peak:
        first = before + 1.0  # 4,000 bytes
        second = first.view(10, 100) * 2.0  # 8,000
        del first
        third = second.t().contiguous()  # 8,000 again
        before.add_(third.flatten())  # what was there before does not count, written to or not
        del second, third
        torch.zeros(500)  # 2,000
    assert peak.extra_bytes == 8000


def test_the_meter_reports_after_a_failure() -> None:
    with pytest.raises(ZeroDivisionError), measured_peak(torch.device("cpu")) as peak:
        kept = torch.ones(250).clone()
        assert 1 // (len(kept) - 250)
    assert peak.extra_bytes == 2000  # both


# --- one layer --------------------------------------------------------------------------------------------------------


def kept_per_token(model: MtpCausalLM, layer: int, tokens: int, autocast: bool) -> float:
    """Bytes of the distinct tensors that autograd saves in a layer, parameters apart."""
    decoder = model.backbone.get_decoder()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    x = torch.randn(2, tokens // 2, decoder.config.hidden_size, requires_grad=True) * 1.0
    positions = torch.arange(tokens // 2)[None]
    rotary = decoder.rotary_emb(x, positions)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        decoder.layers[layer](x, position_embeddings=rotary, attention_mask=None, position_ids=positions)
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights) / tokens


@pytest.mark.parametrize("name", LANGUAGE)
def test_what_a_layer_keeps(name: str) -> None:
    config = canonical(FAMILIES_NATIVE[name] | PLAIN.get(name, {}))
    family, model = FAMILIES[name], initialise(config, seed=0)
    model.set_experts_implementation(BATCHED_EXPERTS)
    kinds = {tuple(block.tables): number for number, block in enumerate(family.layer_blocks(config))}
    for number in kinds.values():
        block = family.layer_blocks(config)[number]
        args = (block, family.sizes(config), family.hidden, config["num_experts_per_tok"])
        expected = saved_bytes(*args, CPU)
        assert kept_per_token(model, number, 256, autocast=False) == pytest.approx(expected, rel=0.12), number
        if "deltanet" not in block.tables:  # its reference is not what runs on a GPU, see the next test
            # Copies of weights in bfloat16 are kept too; they are counted by `gathered_bytes`.
            weights = 2 * sum(p.numel() for p in model.backbone.get_decoder().layers[number].parameters()) / 1024
            found = kept_per_token(model, number, 1024, autocast=True) - weights
            assert found == pytest.approx(saved_bytes(*args, AUTOCAST_WITHOUT_FUSED_KERNELS), rel=0.12), number


def test_fused_deltanet_kernels_keep_a_fraction() -> None:
    """By hand, at the true widths, per token: 32 heads of 128, convolution over 8,192 channels, hidden 2,048."""
    family, config = read_config(Path(__file__).parent.parent / "recipes" / "qwen3-next-80b-a3b.json")
    sizes, block = family.sizes(config), family.layer_blocks(config)[0]

    def kept(precision: Precision) -> int:
        return saved_bytes(block, sizes, family.hidden, 10, precision)

    fused, reference = kept(Precision(2, True, True)), kept(AUTOCAST_WITHOUT_FUSED_KERNELS)
    of_reference = 2 * 2 * 8192 + 4 * (12 * 4096 + 3 * 4096 + (5 * 64 + 10) * 32 + 32 * 128 * 128 // 64)
    assert reference - fused == of_reference - (2 * (3 * 8192 + 64 * 32) + 4 * 6 * 32)


# --- a whole step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"recompute_activations": True}, {"micro_batch_size": 1}], ids=str)
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_moe", "glm4_moe"])
def test_the_peak_of_a_step(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = canonical(FAMILIES_NATIVE[name])
    ids = torch.randint(config["vocab_size"], (600,), generator=torch.Generator().manual_seed(0)).tolist()
    stream = tiny_stream(tmp_path, [ids], sequence_length=64)
    settings = sections(DistilRecipe, {"tokens": 1280, "batch_size": 2, "loss_chunk_tokens": 64} | changes)
    student = Student(initialise(config, seed=0).train(), FAMILIES[name], config)
    teacher = LiveTeacher(initialise(config, seed=1).eval(), teaches_mtp=False)
    trainer = Trainer(student, teacher, stream, span=Span(0, 10, 10), **settings)
    with measured_peak(trainer.device) as peak:
        trainer.step(0)
    predicted = predict_memory(trainer)
    assert predicted.settings.micro_batches == 2 // predicted.settings.micro_batch_size
    assert predicted.peak_bytes == pytest.approx(held_bytes(trainer) + peak.extra_bytes, rel=0.15)


def test_what_each_setting_does_to_the_prediction() -> None:
    config = tiny_config()

    def peak(**settings: Any) -> int:
        return training_memory(QWEN3_NEXT, config, config, TrainingSettings(**settings)).peak_bytes

    usual = peak()
    assert peak(micro_batch_size=2) > 1.5 * usual
    assert peak(recompute_activations=True) < 0.5 * usual
    assert peak(loss_chunk_tokens=256) < usual < peak(micro_batches=2)
    assert peak(device="cpu", gpus=1) > peak(device="cuda", gpus=1)
    alone = training_memory(QWEN3_NEXT, config, None, TrainingSettings(gpus=1))
    assert alone.teacher_bytes == 0 and alone.peak_bytes < peak(gpus=1)


# --- many devices, frozen parts, the host's memory --------------------------------------------------------------------


def test_more_devices_never_need_more_memory_each() -> None:
    config = tiny_config()

    def peak(**settings: Any) -> int:
        return training_memory(QWEN3_NEXT, config, config, TrainingSettings(micro_batches=2, **settings)).peak_bytes

    peaks = [peak(gpus=gpus) for gpus in (2, 4, 8, 64, 512)]
    assert peaks == sorted(peaks, reverse=True)
    assert peak(gpus=64, shard_ranks=8) == peak(gpus=8)  # copies of the model save nothing
    shared = [peak(gpus=8, expert_ranks=ranks, expert_imbalance=1.0) for ranks in (2, 4, 8)]
    assert shared == sorted(shared, reverse=True)
    assert peak(gpus=8, expert_ranks=2, expert_imbalance=2.0) > shared[0]
    assert peak(gpus=8, reshard_student=False) > peak(gpus=8) < peak(gpus=8, reshard_teacher=False)


def test_frozen_experts_cost_their_weights_in_bfloat16() -> None:
    config = tiny_config()
    total = sum(count(QWEN3_NEXT, config).parts.values()) + count(QWEN3_NEXT, config).mtp_parameters
    experts = sum(unit.routed for unit in weigh(QWEN3_NEXT, config).layers)

    def memory(**settings: Any) -> TrainingMemory:
        return training_memory(QWEN3_NEXT, config, config, TrainingSettings(gpus=1, **settings))

    everything, frozen = memory(), memory(frozen=("routed_experts",))
    assert everything.student_bytes == 12 * total and everything.gradient_bytes == 4 * total
    assert frozen.student_bytes == 12 * (total - experts) + 2 * experts
    assert frozen.gradient_bytes == 4 * (total - experts)
    assert frozen.activation_bytes < everything.activation_bytes
    small = memory(optimizer="adamw_8bit")
    assert small.student_bytes == pytest.approx((4 + 2 * (1 + 4 / 256)) * total, abs=1)
    offloaded = memory(offload="student")
    assert offloaded.student_bytes == offloaded.gradient_bytes == 0
    assert offloaded.host_bytes == 16 * total and everything.host_bytes == 0
    assert memory(offload="all").host_bytes == 18 * total
    assert memory(offload="all").teacher_bytes == 0 < offloaded.teacher_bytes


def test_pinned_tensors_are_rounded_up_to_a_power_of_two() -> None:
    """Six experts of [16, 32] and [32, 8]: 3,072 and 1,536 elements become 4,096 and 2,048."""
    config = tiny_config(num_experts=6, moe_intermediate_size=8)
    blocks = QWEN3_NEXT.moe_blocks(config)
    kinds: list[dict[str, Any]] = [{"offload": "student"}, {"offload": "all"}, {"offload": "none"}]
    frozen = [
        part for part in ("embedding", "norm", "attention", "deltanet", "router", "shared_experts", "mtp_projection")
    ]
    found = []
    for kind in kinds:
        for own in (frozen, [*frozen, "routed_experts"], []):
            settings = TrainingSettings(gpus=1, frozen=tuple(own), **kind)
            student, teacher = (measure(QWEN3_NEXT, config, settings, trains=trains) for trains in (True, False))
            found.append(pinning_bytes(student, teacher, settings))
    experts, everything = 1536 * len(blocks), student.weights.all.rounding
    assert student.weights.all.trained_rounding == everything > experts
    others = everything - experts
    assert found[:3] == [8 * experts + 2 * others, 2 * everything, 8 * everything]
    assert found[3:6] == [size + 2 * everything for size in found[:3]] and found[6:] == [0, 0, 0]


def test_a_teacher_that_is_not_there_as_a_whole() -> None:
    config = tiny_config()

    def memory(**settings: Any) -> TrainingMemory:
        return training_memory(QWEN3_NEXT, config, config, TrainingSettings(gpus=1, memory_budget=1, **settings))

    live, cache, layered = (memory(teacher=kind) for kind in ("live", "cache", "layer_by_layer"))
    assert cache.teacher_bytes == 0 == cache.teacher_layer_bytes
    assert layered.teacher_bytes == 2 * config["vocab_size"] * config["hidden_size"] < live.teacher_bytes
    assert layered.host_bytes == 2 * config["hidden_size"] * 4096
    assert memory(teacher="layer_by_layer", micro_batches=3).host_bytes == 3 * layered.host_bytes


def test_muon_is_predicted_for_the_parts_that_it_updates() -> None:
    assert MUON_PARTS == MUON_PARTS_TRAINED
    config = tiny_config()
    unit = weigh(QWEN3_NEXT, config).all
    memory = training_memory(QWEN3_NEXT, config, None, TrainingSettings(gpus=1, optimizer="muon"))
    assert 0 < unit.muon < unit.dense
    assert memory.student_bytes == 12 * unit.total - 4 * unit.muon
