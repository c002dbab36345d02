"""The command `bench`: real generation on a tiny model, a fake vLLM of the same interface, and what is refused."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny import write_tiny_checkpoint

from slimqwen.errors import UserError
from slimqwen.evaluation.speed import Protocol, _with_vllm, bench, print_speeds

SMALL = Protocol(prompt_tokens=4, new_tokens=5, batch_size=2, runs=2, warmups=1, device="cpu")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("speed")
    write_tiny_checkpoint(folder / "large", hidden_size=40)
    write_tiny_checkpoint(folder / "small", seed=1)
    return [folder / "large", folder / "small"]


def test_measures_every_checkpoint(checkpoints: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    large, small = speeds = bench(checkpoints, SMALL)
    for speed in speeds:
        assert len(speed.prefill_seconds) == len(speed.decode_tokens_per_second) == 2
        assert min(speed.prefill_seconds) > 0.0
    assert large.weight_bytes > small.weight_bytes
    assert large.peak_memory_bytes > 50e6  # PyTorch alone takes more
    print_speeds(speeds, SMALL)
    assert "1.00 x" in capsys.readouterr().out


def test_refuses_what_cannot_be_measured(checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="tokens at most"):
        bench(checkpoints, Protocol(prompt_tokens=10**7))
    with pytest.raises(UserError, match="device 'nowhere' cannot be used"):
        bench(checkpoints, Protocol(prompt_tokens=4, new_tokens=4, device="nowhere"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed here"):
        bench(checkpoints, Protocol(engine="vllm"))


def test_vllm_is_asked_for_the_same_tokens(checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []

    class LLM:
        def __init__(self, model: str, **settings: Any) -> None:
            assert settings["max_model_len"] == 9

        def generate(self, prompts: list[dict[str, list[int]]], parameters: Any, use_tqdm: bool) -> None:
            asked.append((len(prompts), len(prompts[0]["prompt_token_ids"]), parameters.max_tokens))

    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, lambda **settings: SimpleNamespace(**settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr("slimqwen.evaluation.speed._peak_memory", lambda device: 0)
    speed = _with_vllm(checkpoints[0], SMALL)
    assert asked == [(2, 4, 1), (2, 4, 5)] * 3
    assert len(speed.decode_tokens_per_second) == 2
