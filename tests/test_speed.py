"""The command `bench`: real generation on a tiny model, a fake vLLM of the same interface, and what is refused."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import CONTEXT
from tiny import write_tiny_checkpoint

from slimqwen.core.errors import UserError
from slimqwen.evaluation.speed import Protocol, bench, print_speeds

SMALL = Protocol(prompt_tokens=4, new_tokens=5, batch_size=2, runs=2, warmups=1, device="cpu")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("speed")
    write_tiny_checkpoint(folder / "large", hidden_size=40)
    write_tiny_checkpoint(folder / "small", seed=1)
    return [folder / "large", folder / "small"]


@pytest.fixture
def imported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of their own that are forked from one with all imports, which cost seconds of each that is not."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: CONTEXT)


@pytest.mark.usefixtures("imported_once")
def test_measures_every_checkpoint(checkpoints: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    large, small = speeds = bench(checkpoints, SMALL)
    for speed in speeds:
        assert len(speed.prefill_seconds) == len(speed.decode_tokens_per_second) == 2
        assert min(speed.prefill_seconds) > 0.0
    assert large.weight_bytes > small.weight_bytes
    assert large.peak_memory_bytes > 50e6  # PyTorch alone takes more
    print_speeds(speeds, SMALL)
    table = capsys.readouterr().out
    assert "transformers, float32 on cpu, batch 2, 4 tokens read and 5 generated, 2 runs" in table and "1.00 x" in table


@pytest.mark.usefixtures("imported_once")
def test_refuses_what_cannot_be_measured(checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="has a context of"):
        bench(checkpoints, Protocol(prompt_tokens=10**7))
    with pytest.raises(UserError, match="device 'nowhere' cannot be used"):
        bench(checkpoints, Protocol(prompt_tokens=4, new_tokens=4, device="nowhere"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed here"):
        bench(checkpoints, Protocol(engine="vllm"))


FAKE_VLLM = """
import json, os, time

class SamplingParams:
    def __init__(self, *, max_tokens, ignore_eos, temperature, detokenize):
        assert ignore_eos and temperature == 0.0 and not detokenize
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, model, **settings):
        self.calls = [settings]

    def generate(self, prompts, sampling_params, use_tqdm):
        time.sleep(0.001 * sampling_params.max_tokens)
        self.calls.append([[len(prompt["prompt_token_ids"]) for prompt in prompts], sampling_params.max_tokens])
        with open(os.environ["VLLM_CALLS"], "w") as file:
            json.dump(self.calls, file)
"""


def test_vllm_is_asked_for_the_same_tokens(
    checkpoints: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A package that is found where vLLM would be, in the process of its own that every checkpoint gets."""
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VLLM_CALLS", str(tmp_path / "calls.json"))
    vllm = replace(SMALL, engine="vllm", device="auto", dtype="bfloat16")
    speeds = bench(checkpoints[:1], vllm)
    settings, *calls = json.loads((tmp_path / "calls.json").read_text())
    assert calls == [[[4, 4], 1], [[4, 4], 5]] * 3
    assert (settings["max_model_len"], settings["dtype"]) == (9, "bfloat16")
    assert settings["enable_prefix_caching"] is False  # the same prompts again and again
    assert len(speeds[0].decode_tokens_per_second) == 2 and speeds[0].peak_memory_bytes is None
    print_speeds(speeds, vllm)
    assert "vllm, dtype bfloat16, batch 2" in capsys.readouterr().out
    with pytest.raises(UserError, match="leave out --device cpu"):
        bench(checkpoints, replace(vllm, device="cpu"))
