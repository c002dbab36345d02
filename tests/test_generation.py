"""Speculative decoding: greedily the backbone's own tokens, sampled its own distribution, and states that roll back."""

import json
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from rounding import FORWARD, error
from test_cli import Result, assert_one_sentence, slimqwen
from tiny import QWEN3_NEXT, write_tiny_checkpoint, write_tiny_tokens
from tiny_families import FAMILIES_NATIVE
from torch import Tensor
from transformers import TopPLogitsWarper

from slimqwen.builtin import TEACHER
from slimqwen.core.errors import StageFailed, UserError
from slimqwen.data.tokenizer import load_tokenizer
from slimqwen.evaluation.acceptance import accepted_drafts, continue_greedily
from slimqwen.generation.sampling import GREEDY, Sampling, accept, draw
from slimqwen.generation.speculative import Drafter, speculate
from slimqwen.generation.state import MOST_RECOMPUTED_TOKENS, CachedBackbone
from slimqwen.model.model import MtpCausalLM, load

pytestmark = pytest.mark.rounding

WITH_MTP = ("qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe", "glm4_moe")
PROMPT = torch.tensor([5, 17, 200, 31, 8, 8, 120])
NEW_TOKENS = 18


@pytest.fixture(scope="module", params=WITH_MTP)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MtpCausalLM:
    folder = tmp_path_factory.mktemp("generation") / request.param
    return load(write_tiny_checkpoint(folder, native=FAMILIES_NATIVE[request.param], seed=2))


@pytest.fixture(scope="module")
def teacher() -> MtpCausalLM:
    return load(TEACHER)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> MtpCausalLM:
    return load(write_tiny_checkpoint(tmp_path_factory.mktemp("generation") / "hybrid"))


@pytest.fixture(scope="module")
def four_words(tmp_path_factory: pytest.TempPathFactory) -> MtpCausalLM:
    """Four words, so that all continuations can be listed, and two layers."""
    native = QWEN3_NEXT | {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
    return load(write_tiny_checkpoint(tmp_path_factory.mktemp("generation") / "four", native=native, vocab_size=4))


def good_drafts(model: MtpCausalLM, monkeypatch: pytest.MonkeyPatch, wrong_every: int = 3) -> None:
    """An untrained MTP module is hardly ever right. Here its drafts are the known continuation, but each third is wrong."""
    choices = continue_greedily(model.backbone, PROMPT[None], NEW_TOKENS + 8)[0]
    original = Drafter.draft
    read = 0

    def draft(drafter: Drafter, hidden: Tensor, following: Tensor, count: int) -> tuple[Tensor, Tensor]:
        nonlocal read
        original(drafter, hidden, following, count)
        read += hidden.shape[1]
        positions = read + 1 + torch.arange(count)
        drafts = (choices[positions] + (positions % wrong_every == 0)) % len(model.head)
        return drafts, torch.nn.functional.one_hot(drafts, len(model.head)).float()

    monkeypatch.setattr(Drafter, "draft", draft)


# Greedy: token for token


def greedy_margin(model: MtpCausalLM, sequence: Tensor, prompt_tokens: int) -> float:
    """By how much the chosen token's logit is above the second, at the least. Rounding must be far below."""
    with torch.no_grad():
        best = model.backbone(sequence[None]).logits[0, prompt_tokens - 1 : -1].topk(2).values
    return float((best[:, 0] - best[:, 1]).min())


@pytest.mark.parametrize(("drafts", "draft"), [("none", 0), ("the module's", 3), ("mixed", 1), ("mixed", 5)])
def test_greedy_is_the_backbones_own_text(
    tiny: MtpCausalLM, drafts: str, draft: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every family, drafts that are all wrong (an untrained module) and drafts of which some runs are right.

    The reference is Transformers' generate(). Logits differ by less than 1e-4 with the number of tokens read at once, the
    closest choice by more than 4e-3, so equality is no luck. (float64 would not help: the delta rule, the norms
    and the router compute in float32 in any model.)
    """
    sequence = continue_greedily(tiny.backbone, PROMPT[None], NEW_TOKENS)[0]
    assert greedy_margin(tiny, sequence, len(PROMPT)) > 4e-3
    if drafts == "mixed":
        good_drafts(tiny, monkeypatch)
    made = speculate(tiny, PROMPT, draft=draft, max_new_tokens=NEW_TOKENS)
    assert made.tokens == sequence[len(PROMPT) :].tolist()
    assert made.stopped == "max_new_tokens"
    if drafts == "mixed":
        assert 0 < sum(made.accepted_by_depth) < sum(made.proposed_by_depth)
    assert made.verifications + sum(made.accepted_by_depth) == NEW_TOKENS - 1


def test_greedy_of_the_builtin_teacher(teacher: MtpCausalLM) -> None:
    """A trained MTP module: most first drafts are right, and a verification yields more than one and a half tokens."""
    prompt = torch.tensor(
        load_tokenizer(TEACHER).encode('def read_lines(path):\n    """Read the lines of a file."""\n')
    )
    sequence = continue_greedily(teacher.backbone, prompt[None], 32)[0]
    assert greedy_margin(teacher, sequence, len(prompt)) > 1e-3
    made = speculate(teacher, prompt, draft=3, max_new_tokens=32)
    assert made.tokens == sequence[len(prompt) :].tolist()
    assert made.cumulative_acceptance[0] > 0.5
    assert made.tokens_per_verification is not None and made.tokens_per_verification > 1.5


# Rolling back


def states(reader: CachedBackbone) -> list[Tensor]:
    """Everything the cache holds."""
    tensors: list[Tensor] = []
    for layer in reader.cache.layers:
        if layer.__class__.__name__ == "LinearAttentionLayer":
            tensors += [*layer.conv_states.values(), *layer.recurrent_states.values()]
        else:
            tensors += [layer.keys, layer.values]
    return tensors


@torch.inference_mode()
def test_forgotten_tokens_leave_no_trace(tiny: MtpCausalLM) -> None:
    """After reading 4 tokens and forgetting up to 3 of them, what follows is as if they had never been read.

    17 tokens are kept in the first 8 rounds: the inputs that DeltaNet layers read again pass their limit.
    Rounding is below FORWARD; a state that keeps forgotten tokens is off by more than 1e-2 (the next test).
    """
    generator = torch.Generator().manual_seed(0)
    forgotten = [2, 1, 3, 2, 1, 2, 3, 1, 2, 0, 3, 1]
    assert sum(4 - count for count in forgotten[:8]) > MOST_RECOMPUTED_TOKENS
    kept = torch.randint(300, (5 + sum(4 - count for count in forgotten),), generator=generator)
    straight, reader = CachedBackbone(tiny.backbone), CachedBackbone(tiny.backbone)
    expected = straight.read(kept[None])
    position = 5
    reader.read(kept[None, :position])
    for count in forgotten:
        end = position + 4 - count
        piece = torch.cat([kept[position:end], torch.randint(300, (count,), generator=generator)])
        outputs = reader.read_revocably(piece[None])[:, : end - position]
        assert error(outputs, expected[:, position:end]) < FORWARD
        reader.forget(count)
        position = end

    for each in (straight, reader):  # a piece of which nothing is forgotten brings every state up to date
        each.read_revocably(kept[None, :1])
        each.forget(0)
    for mine, reference in zip(states(reader), states(straight), strict=True):
        assert error(mine, reference) < FORWARD


@torch.inference_mode()
def test_without_rolling_back_the_test_above_would_fail(hybrid: MtpCausalLM) -> None:
    """Cropping keys and values alone leaves the forgotten tokens in the DeltaNet state, and it shows."""
    reader = CachedBackbone(hybrid.backbone)
    reader.read(PROMPT[None])
    reader.read_revocably(torch.tensor([[9, 11, 12]]))
    for layer in reader.cache.layers:
        if layer.__class__.__name__ == "DynamicLayer":
            layer.crop(-2)
    left = reader.read(torch.tensor([[40]]))
    right = CachedBackbone(hybrid.backbone).read(torch.cat([PROMPT, torch.tensor([9, 40])])[None])[:, -1:]
    assert (left - right).abs().max() > 1e-2


def test_nothing_stays_on_the_model(hybrid: MtpCausalLM) -> None:
    """Hooks are gone afterwards: the next forward pass of the same model is an ordinary one."""
    with torch.no_grad():
        before = hybrid(PROMPT[None]).main
        speculate(hybrid, PROMPT, draft=3, max_new_tokens=9)
        assert torch.equal(hybrid(PROMPT[None]).main, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in hybrid.modules())


# Drafts


@torch.inference_mode()
def test_drafts_are_the_modules(tiny: MtpCausalLM) -> None:
    """Depth 0 with the cache is the module's pass over the whole sequence; deeper ones extend it token by token."""
    assert tiny.mtp is not None
    decoder = tiny.backbone.get_decoder()
    tokens = torch.cat([PROMPT, torch.tensor([50, 60, 70])])
    hidden = decoder(input_ids=tokens[None, :-1], use_cache=False).last_hidden_state
    drafter = Drafter(tiny, GREEDY, torch.Generator())
    drafter.draft(hidden[:, :4], tokens[1:5], 3)  # whose deeper entries must be gone again
    drafts, drafted = drafter.draft(hidden[:, 4:], tokens[5:], 3)
    assert torch.equal(drafted.argmax(-1), drafts)

    inputs, following = hidden, tokens[1:]
    for draft in drafts:  # without any cache: all positions again, the module's own output put behind
        outputs = tiny.mtp(inputs, decoder.embed_tokens(following)[None], decoder.rotary_emb)
        assert int((outputs[0, -1] @ tiny.head.T).argmax()) == int(draft)
        inputs = torch.cat([inputs, outputs[:, -1:]], dim=1)
        following = torch.cat([following, draft[None]])


def test_first_acceptance_is_evaluations(teacher: MtpCausalLM) -> None:
    """With one draft per round, every round's draft is one that acceptance.accepted_drafts judges, with its verdict."""
    prompt = torch.tensor(load_tokenizer(TEACHER).encode("class Queue:\n    def __init__(self, size):\n"))
    sequence = continue_greedily(teacher.backbone, prompt[None], 26)
    verdicts = accepted_drafts(teacher, sequence, len(prompt), 1)[0, :, 0].tolist()
    rounds: list[bool] = []
    lengths: list[int] = []
    speculate(teacher, prompt, draft=1, max_new_tokens=25, emit=lambda new: lengths.append(len(new)))
    position = 0
    for length in lengths[1:-1]:  # a round of two tokens accepted its draft
        rounds.append(length == 2)
        assert verdicts[position] == rounds[-1], position
        position += length
    assert any(rounds) and not all(rounds)


# Sampling


def test_one_draw_keeps_the_distribution() -> None:
    """Drafts of two tokens from q, judged by p, over a vocabulary of 4: pairs come as often as p says (chi-square).

    p and q depend on the token before. 2,000 rounds; 15 degrees of freedom: 37.7 is exceeded once in 1,000. Taking
    the token after a rejection from p instead of max(p - q, 0) exceeds it by far, which the second half shows.
    """

    def pairs(rejected_from_p: bool) -> float:
        generator = torch.Generator().manual_seed(1)
        first_p, first_q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
        p = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25] * 4, [0.0, 0.5, 0.5, 0.0], [0.1, 0.2, 0.6, 0.1]])
        q = torch.tensor([[0.1, 0.7, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1], [0.5, 0.0, 0.5, 0.0], [0.1, 0.2, 0.6, 0.1]])
        rounds = 2_000
        seen: Counter[tuple[int, int]] = Counter()
        for _ in range(rounds):
            one = draw(first_q, generator)
            two = draw(q[one[0]], generator)
            target = torch.stack([first_p, p[one[0]], torch.ones(4)])
            drafts = torch.cat([one, two])
            accepted, own = accept(target, torch.stack([first_q, q[one[0]]]), drafts, generator)
            if accepted < 2 and rejected_from_p:
                own = int(draw(target[accepted], generator))
            pair = [*drafts[:accepted].tolist(), own]
            if len(pair) == 1:
                pair.append(int(draw(p[pair[0]], generator)))  # the next round would
            seen[pair[0], pair[1]] += 1
        expected = {pair: rounds * float(first_p[pair[0]] * p[pair]) for pair in product(range(4), repeat=2)}
        assert all(expected[pair] > 0 for pair in seen)
        return sum((seen[pair] - count) ** 2 / count for pair, count in expected.items() if count)

    assert pairs(rejected_from_p=False) < 37.7
    assert pairs(rejected_from_p=True) > 100


@torch.inference_mode()
def test_sampled_text_has_the_backbones_distribution(four_words: MtpCausalLM) -> None:
    """The whole loop, MTP module and cache included: all 16 pairs that can follow the first token, as often as they should.

    120 runs. Chi-square over 15 degrees of freedom: 37.7 is exceeded once in 1,000.
    """
    prompt, sampling, runs = torch.tensor([1, 3, 0, 2]), Sampling(temperature=1.5), 120

    def probabilities(*tokens: int) -> Tensor:
        read = torch.cat([prompt, prompt.new_tensor(tokens)])
        return sampling.probabilities(four_words.backbone(read[None]).logits[0, -1])

    exact = torch.zeros(4, 4)
    for a, b in product(range(4), repeat=2):
        exact[b] += probabilities()[a] * probabilities(a)[b] * probabilities(a, b)
    seen = torch.zeros(4, 4)
    accepted = 0
    for seed in range(runs):
        made = speculate(four_words, prompt, draft=1, max_new_tokens=3, sampling=sampling, seed=seed)
        seen[made.tokens[1], made.tokens[2]] += 1
        accepted += made.accepted_by_depth[0]
    assert 0.2 < accepted / runs < 0.9  # both cases count
    assert float(((seen - runs * exact) ** 2 / (runs * exact)).sum()) < 37.7


def test_seed_decides(teacher: MtpCausalLM) -> None:
    prompt = torch.tensor([40, 300, 7])

    def tokens(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, top_p=0.9)
        return speculate(teacher, prompt, draft=2, max_new_tokens=12, sampling=sampling, seed=seed).tokens

    assert tokens(1) == tokens(1) != tokens(2)


def test_top_p_is_transformers() -> None:
    logits = 3 * torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    for top_p in (0.3, 0.9, 1.0):
        warped = TopPLogitsWarper(top_p)(None, logits / 0.8).softmax(-1) if top_p < 1 else (logits / 0.8).softmax(-1)
        torch.testing.assert_close(Sampling(0.8, top_p).probabilities(logits), warped)
    almost_greedy = Sampling(1.0, 1e-9).probabilities(logits)
    assert torch.equal(almost_greedy.argmax(-1), logits.argmax(-1)) and torch.equal(
        almost_greedy.amax(-1), torch.ones(5)
    )


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 2.0}]
)
def test_meaningless_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


# Where it ends


def test_end_of_text_stops(hybrid: MtpCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within a run of accepted drafts; the end-of-text token is the last, as generate() has it."""
    tokens = continue_greedily(hybrid.backbone, PROMPT[None], NEW_TOKENS)[0, len(PROMPT) :].tolist()
    for end in (0, 7, 8):
        emitted: list[int] = []
        with monkeypatch.context() as patch:
            good_drafts(hybrid, patch, wrong_every=1000)
            made = speculate(
                hybrid, PROMPT, draft=3, max_new_tokens=NEW_TOKENS, end_of_text={tokens[end]}, emit=emitted.extend
            )
        assert made.tokens == emitted == tokens[: tokens.index(tokens[end]) + 1]
        assert made.stopped == "end_of_text"


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4])
def test_never_more_than_asked_for(hybrid: MtpCausalLM, new_tokens: int) -> None:
    made = speculate(hybrid, PROMPT, draft=3, max_new_tokens=new_tokens)
    assert len(made.tokens) == new_tokens and made.stopped == "max_new_tokens"
    assert [made.proposed_by_depth[k] > 0 for k in range(3)] == [new_tokens > k + 2 for k in range(3)]


def test_context_ends_it(hybrid: MtpCausalLM) -> None:
    context = 512
    prompt = torch.arange(context - 3) % 300
    made = speculate(hybrid, prompt, draft=3, max_new_tokens=50)
    assert len(made.tokens) == 3 and made.stopped == "context"
    for wrong, sentence in ((torch.zeros(context, dtype=torch.long), "512"), (prompt[:0], "no tokens")):
        with pytest.raises(UserError, match=sentence):
            speculate(hybrid, wrong, draft=3, max_new_tokens=1)


def test_broken_weights_are_told(tmp_path: Path) -> None:
    model = load(write_tiny_checkpoint(tmp_path / "model"))
    with torch.no_grad():
        model.head[3, 5] = float("nan")
    with pytest.raises(StageFailed, match="not finite"):
        speculate(model, PROMPT, draft=0, max_new_tokens=4)


# The command


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    tokenizer, _ = write_tiny_tokens(folder / "data")
    write_tiny_checkpoint(folder / "with", tokenizer=tokenizer)
    write_tiny_checkpoint(folder / "without", tokenizer=tokenizer, num_nextn_predict_layers=0)
    return folder


def generate(checkpoint: Path, *arguments: object) -> Result:
    return slimqwen("generate", checkpoint, "--prompt", "index = value", "--max-new-tokens", 12, *arguments)


def test_command_says_text_and_numbers_apart(checkpoints: Path) -> None:
    result = generate(checkpoints / "with", "--draft", 2, "--compare")
    assert result.returncode == 0, result.stderr
    shown = json.loads(generate(checkpoints / "with", "--draft", 2, "--json").stdout)
    assert result.stdout == shown["text"] + "\n"
    for words in (
        "acc_0",
        "acc_1",
        "cumulative",
        "conditional",
        "verifications",
        "tokens/s",
        "the tokens are identical",
    ):
        assert words in result.stderr, words
    assert len(shown["tokens"]) == 12 and shown["draft"] == 2 and shown["comparison"] is None
    assert shown["verifications"] + sum(shown["accepted_by_depth"]) == 11


def test_command_without_mtp(checkpoints: Path) -> None:
    result = generate(checkpoints / "without")
    assert result.returncode == 0, result.stderr
    assert "no MTP module" in result.stderr
    assert_one_sentence(generate(checkpoints / "without", "--draft", 2), 2, "no MTP module", "leave out --draft")
    assert_one_sentence(generate(checkpoints / "without", "--compare"), 2, "--compare")


def test_command_refuses_in_a_sentence(checkpoints: Path) -> None:
    assert_one_sentence(slimqwen("generate", checkpoints / "with", "--prompt", ""), 2, "no tokens")
    assert_one_sentence(slimqwen("generate", checkpoints / "with", "--prompt", "x1 " * 400), 2, "context of 512")
    assert_one_sentence(slimqwen("generate", checkpoints / "with", "--prompt", "\udce9"), 2, "UTF-8")
    assert_one_sentence(generate(checkpoints / "with", "--top-p", 0), 2, "--top-p")
    assert_one_sentence(slimqwen("generate", "nowhere", "--prompt", "x"), 2, "nowhere")
