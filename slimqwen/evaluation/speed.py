"""The command `bench`: speed of prefill and decoding, and peak memory, of several checkpoints.

The protocol is the paper's (Table 11): prompts of 128 tokens, 128 generated, 10 runs after 3 warm-ups. Each
checkpoint is measured in a process of its own, so that none is affected by another's memory or caches.
"""

import importlib.util
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.errors import StageFailed, UserError
from slimqwen.core.progress import Progress
from slimqwen.core.terminal import DataTable
from slimqwen.model.device import resolve_device, resolve_dtype
from slimqwen.model.model import load

Engine = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class Protocol:
    """The settings of a benchmark. Prompts are random tokens by `seed`, since speed does not depend on the content."""

    prompt_tokens: int = 128
    new_tokens: int = 128
    batch_size: int = 1
    runs: int = 10
    warmups: int = 3
    engine: Engine = "transformers"
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Speed:
    """The measurements of one checkpoint, one value per run.

    prefill_seconds: from the prompts to the first token. decode_tokens_per_second: of all sequences together,
    after the first token. peak_memory_bytes: on a GPU the most that PyTorch had allocated, on a CPU the process's
    largest resident memory, interpreter and libraries included; None with vLLM, which reserves all the GPU memory it may,
    in a process of its own. weight_bytes: in the dtype of the computation; with vLLM, on disk.
    """

    checkpoint: str
    prefill_seconds: list[float]
    decode_tokens_per_second: list[float]
    peak_memory_bytes: int | None
    weight_bytes: int


def bench(checkpoints: list[Path], protocol: Protocol) -> list[Speed]:
    """Measure each checkpoint. Raises UserError for one that cannot be loaded or is too small, or a missing engine."""
    if protocol.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("--engine vllm needs vLLM, which is not installed here: pip install vllm, or leave it out.")
    if protocol.engine == "vllm" and protocol.device != "auto":
        raise UserError(f"vLLM chooses its device itself: leave out --device {protocol.device}.")
    for folder in checkpoints:
        limit = Checkpoint(folder).config["max_position_embeddings"]
        if protocol.prompt_tokens + protocol.new_tokens > limit:
            raise UserError(
                f"{folder} has a context of {limit:,} tokens, fewer than {protocol.prompt_tokens:,} of the prompt and "
                f"{protocol.new_tokens:,} new ones: reduce them."
            )
    results = []
    for folder in checkpoints:
        receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=_measure, args=(folder, protocol, sender))
        process.start()
        sender.close()
        try:
            answer = json.loads(receiver.recv())
        except EOFError:
            process.join()
            raise StageFailed(
                f"measuring {folder} ended without a result (exit code {process.exitcode}), perhaps out of memory: see its "
                "output above."
            ) from None
        process.join()
        if "error" in answer:
            raise UserError(answer["error"])
        results.append(Speed(**answer))
    return results


def _measure(folder: Path, protocol: Protocol, sender: Any) -> None:
    """Measure in a process of its own, and send the result, or the message of a UserError, as JSON."""
    try:
        measure = {"transformers": _with_transformers, "vllm": _with_vllm}[protocol.engine]
        sender.send(json.dumps(asdict(measure(folder, protocol))))
    except UserError as error:
        sender.send(json.dumps({"error": str(error)}))


@torch.inference_mode()
def _with_transformers(folder: Path, protocol: Protocol) -> Speed:
    device = resolve_device(protocol.device)
    model = load(folder, resolve_dtype(protocol.dtype, device), device).backbone
    model.generation_config = GenerationConfig()  # not the checkpoint's own, which may stop early or have penalties
    prompts = _prompts(folder, protocol).to(device)
    mask = torch.ones_like(prompts)
    new_tokens = protocol.new_tokens

    def seconds(work: Callable[[], object]) -> float:
        _wait_for(device)
        started = time.perf_counter()
        work()
        _wait_for(device)
        return time.perf_counter() - started

    def generate(tokens: int) -> object:
        return model.generate(
            prompts, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )

    prefill, decode = [], []
    with Progress(f"bench {folder.name}", total=protocol.warmups + protocol.runs, unit="runs") as progress:
        for run in range(protocol.warmups + protocol.runs):
            first = seconds(lambda: generate(1))
            rest = seconds(lambda: generate(new_tokens)) - first
            if run >= protocol.warmups:
                prefill.append(first)
                decode.append(protocol.batch_size * (new_tokens - 1) / rest)
            progress.advance(1)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return Speed(str(folder), prefill, decode, _peak_memory(device), weights)


def _with_vllm(folder: Path, protocol: Protocol) -> Speed:
    """Measure with vLLM's offline API."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(folder),
        max_model_len=protocol.prompt_tokens + protocol.new_tokens,
        dtype=protocol.dtype,
        enable_prefix_caching=False,  # otherwise only the first run would compute the prompts
        skip_tokenizer_init=True,
        seed=protocol.seed,
    )
    prompts = [{"prompt_token_ids": row} for row in _prompts(folder, protocol).tolist()]

    def seconds(tokens: int) -> float:
        parameters = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0, detokenize=False)
        started = time.perf_counter()
        engine.generate(prompts, parameters, use_tqdm=False)
        return time.perf_counter() - started

    prefill, decode = [], []
    for run in range(protocol.warmups + protocol.runs):
        first = seconds(1)
        rest = seconds(protocol.new_tokens) - first
        if run >= protocol.warmups:
            prefill.append(first)
            decode.append(protocol.batch_size * (protocol.new_tokens - 1) / rest)
    return Speed(str(folder), prefill, decode, None, Checkpoint(folder).bytes())


def _prompts(folder: Path, protocol: Protocol) -> torch.Tensor:
    """Draw random token ids, int64 [batch, prompt]."""
    vocab_size = Checkpoint(folder).config["vocab_size"]
    generator = torch.Generator().manual_seed(protocol.seed)
    return torch.randint(vocab_size, (protocol.batch_size, protocol.prompt_tokens), generator=generator)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def print_speeds(speeds: list[Speed], protocol: Protocol) -> None:
    """Print a table of mean and standard deviation over runs, and the ratio of each checkpoint to the first."""
    title = (
        f"{_engine_in_words(protocol)}, batch {protocol.batch_size}, {protocol.prompt_tokens} tokens read and "
        f"{protocol.new_tokens} generated, {protocol.runs} runs"
    )
    columns = ("prefill, ms", "decode, tokens/s", "decode, relative to the first", "peak memory", "weights")
    table = DataTable("checkpoint", *columns, title=title)
    for speed in speeds:
        table.add(
            speed.checkpoint,
            _mean_and_spread([1000 * seconds for seconds in speed.prefill_seconds]),
            _mean_and_spread(speed.decode_tokens_per_second),
            f"{fmean(speed.decode_tokens_per_second) / fmean(speeds[0].decode_tokens_per_second):.2f} x",
            "-" if speed.peak_memory_bytes is None else bytes_in_words(speed.peak_memory_bytes),
            bytes_in_words(speed.weight_bytes),
        )
    table.show()


def _engine_in_words(protocol: Protocol) -> str:
    """Describe the engine: `transformers, float32 on cpu`."""
    if protocol.engine == "vllm":  # which chooses device and dtype itself
        return f"vllm, dtype {protocol.dtype}"
    device = resolve_device(protocol.device)
    return f"transformers, {str(resolve_dtype(protocol.dtype, device)).removeprefix('torch.')} on {device}"


def _mean_and_spread(values: list[float]) -> str:
    mean = f"{fmean(values):,.2f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):,.2f}"
