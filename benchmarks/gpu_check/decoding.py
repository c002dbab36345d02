"""Generation, plain and with drafts of the MTP module: the same greedy tokens, and tokens/s."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from section import Part, Section
from synthetic import write_synthetic

from slimqwen.builtin import TEACHER
from slimqwen.checkpoint.config import read_json
from slimqwen.generation.speculative import Generation, speculate
from slimqwen.model.model import MtpCausalLM, load

ROOT = Path(__file__).resolve().parents[2]
DRAFTS = (0, 1, 3)
TRUE_WIDTHS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "num_experts": 64,
    "num_nextn_predict_layers": 1,
}


def generate(part: Part, model: MtpCausalLM, device: str, new_tokens: int) -> dict[int, Generation]:
    """Continue one prompt with each number of drafts; note the speeds."""
    vocab = model.head.shape[0]
    prompt = torch.randint(vocab, (32,), generator=torch.Generator().manual_seed(0)).to(device)
    results = {}
    for draft in DRAFTS:
        speculate(model, prompt, draft=draft, max_new_tokens=4)  # warms up
        results[draft] = speculate(model, prompt, draft=draft, max_new_tokens=new_tokens)
        part.note(
            **{
                f"tokens_per_second_draft_{draft}": results[draft].tokens_per_second,
                f"tokens_per_verification_draft_{draft}": results[draft].tokens_per_verification,
            }
        )
    return results


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    with Section() as section, tempfile.TemporaryDirectory() as temporary:
        new_tokens = 16 if section.quick else 128
        with section.part("built-in teacher in float32") as part:
            results = generate(part, load(TEACHER, torch.float32, section.device), section.device, new_tokens)
            for draft in DRAFTS[1:]:
                part.check(f"draft {draft} gives the tokens of draft 0", results[draft].tokens == results[0].tokens)
        if section.on_gpu:
            with section.part("true widths, 4 layers, in bfloat16") as part:
                folder = Path(temporary) / "checkpoint"
                folder.mkdir()
                write_synthetic(folder, read_json(ROOT / "recipes/qwen3-next-80b-a3b.json") | TRUE_WIDTHS)
                model = load(folder, torch.bfloat16, section.device)
                part.note(weights_gb=sum(parameter.nbytes for parameter in model.parameters()) / 1e9)
                generate(part, model, section.device, new_tokens)


if __name__ == "__main__":
    main()
