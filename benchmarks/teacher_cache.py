"""The share of a teacher's divergence from a student that its k most likely tokens show, on held-out text.

    python benchmarks/teacher_cache.py STUDENT --tokens DIR [--teacher CHECKPOINT] [--measured-tokens N] [--json]

For each k, over the same predictions of the main head:

    tail     mean probability of the teacher's tokens beyond its k most likely
    kl       mean KL(teacher || student) over the whole vocabulary, nats
    coarse   the same from the cache: over the k tokens and all others as one
    lost     1 - coarse / kl
    bytes    per predicted token in the cache
"""

import argparse
import json
from pathlib import Path

import torch
from synthetic import folder_to_use

from slimqwen.builtin import checkpoint_folder
from slimqwen.evaluation.fidelity import ONLY_MEASURED, Recording, heldout_rows, record
from slimqwen.losses.head import Logits
from slimqwen.losses.loss import chunked_loss
from slimqwen.losses.signal import LiveSignal, StoredSignal
from slimqwen.model.model import load
from slimqwen.teacher_cache.records import bytes_per_token, pack, unpack
from slimqwen.teacher_cache.write import CHUNK_TOKENS, select_most_likely

SIZES = (8, 16, 32, 64, 128)


def record_model(folder: Path, tokens: Path, wanted_tokens: int, sequence_length: int) -> Recording:
    """Run a model on held-out text."""
    model = load(folder)
    rows = heldout_rows(tokens, sequence_length, wanted_tokens)
    return record(model, model.family, model.config, rows, batch_size=8, title=folder.name)


@torch.inference_mode()
def measure(student: Recording, teacher: Recording, k: int) -> dict[str, float]:
    """Compare the whole divergence with that over the k most likely tokens."""
    vocab = teacher.head.shape[0]
    logits = Logits(teacher.head, CHUNK_TOKENS)
    tokens = tail = kl = coarse = 0.0
    for predictions, recorded in zip(student.predictions, teacher.predictions, strict=True):
        top = select_most_likely(logits, recorded.hidden, k)
        stored = StoredSignal(unpack(pack(top, vocab, exact=False), vocab))
        sums = [
            chunked_loss(predictions, student.head, ONLY_MEASURED, teacher=signal, chunk_tokens=CHUNK_TOKENS)[1]
            for signal in (LiveSignal(recorded.hidden, teacher.head), stored)
        ]
        assert sums[0].kd is not None and sums[1].kd is not None
        tail += float(top.log_tail.double().exp().sum())
        kl, coarse = kl + float(sums[0].kd), coarse + float(sums[1].kd)
        tokens += len(top.ids)
    means = {"tail": tail / tokens, "kl": kl / tokens, "coarse": coarse / tokens, "lost": 1 - coarse / kl}
    return {"k": k, **means, "bytes": bytes_per_token(k, vocab, exact=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="checkpoint folder, or 'builtin'")
    parser.add_argument("--tokens", type=folder_to_use, required=True)
    parser.add_argument("--teacher", default="builtin")
    parser.add_argument("--measured-tokens", type=int, default=16_384)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    settings = options.tokens, options.measured_tokens, options.sequence_length
    student = record_model(checkpoint_folder(options.student), *settings)
    teacher = record_model(checkpoint_folder(options.teacher), *settings)
    rows = [measure(student, teacher, k) for k in SIZES]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'k':>5}{'tail':>11}{'kl':>9}{'coarse':>9}{'lost':>9}{'bytes':>7}")
    for row in rows:
        print(
            f"{row['k']:>5}{row['tail']:>11.2e}{row['kl']:>9.4f}{row['coarse']:>9.4f}{row['lost']:>9.2%}{row['bytes']:>7}"
        )


if __name__ == "__main__":
    main()
