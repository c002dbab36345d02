"""What the device can do at most: products, memory, transfers, launches. The other numbers are compared with these."""

import time

import torch
from section import Section, Skip, median_seconds, wait

from slimqwen.model.internals import grouped_linear
from slimqwen.model.peaks import dense_bf16_flops


def main() -> None:
    with Section() as section:
        device, quick = section.device, section.quick
        dtype = torch.bfloat16 if section.on_gpu else torch.float32
        with section.part("matrix product") as part:
            size = 256 if quick else 8192
            left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            took = median_seconds(lambda: left @ right, device, rounds=3 if quick else 10)
            rate = 2 * size**3 / took
            part.note(size=size, tflops=rate / 1e12)
            peak = dense_bf16_flops(torch.device(device, 0)) if section.on_gpu else None
            if peak is not None:
                part.note(of_data_sheet=rate / peak)
        with section.part("grouped product") as part:
            # The experts of Qwen3-Next-80B-A3B: 4,096 tokens, 10 of 512 experts each, hidden 2,048, intermediate 512.
            experts, hidden, neurons, rows = (4, 64, 32, 64) if quick else (512, 2048, 512, 40_960)
            weight = torch.randn(experts, 2 * neurons, hidden, device=device, dtype=dtype)
            x = torch.randn(rows, hidden, device=device, dtype=dtype)
            offsets = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * (rows // experts)
            took = median_seconds(lambda: grouped_linear(x, weight, offsets), device, rounds=3 if quick else 10)
            part.note(experts=experts, rows=rows, tflops=4 * rows * hidden * neurons / took / 1e12)
        with section.part("copy on the device") as part:
            source = torch.zeros((1 << 16) if quick else (1 << 30), device=device)
            target = torch.empty_like(source)
            took = median_seconds(lambda: target.copy_(source), device, rounds=3 if quick else 10)
            part.note(bytes=source.nbytes, gb_per_second=2 * source.nbytes / took / 1e9)
        with section.part("transfers") as part:
            if not section.on_gpu:
                raise Skip("there is nothing to transfer to on a CPU")
            host = torch.zeros(1 << 20 if quick else 1 << 28, pin_memory=True)
            remote = torch.empty_like(host, device=device)
            for name, work in (
                ("to_device", lambda: remote.copy_(host, non_blocking=True)),
                ("to_host", lambda: host.copy_(remote, non_blocking=True)),
            ):
                took = median_seconds(work, device, rounds=5)
                part.note(**{f"{name}_gb_per_second": host.nbytes / took / 1e9})
        with section.part("launches") as part:
            small, count = torch.zeros(1, device=device), 200 if quick else 5000
            wait(device)
            started = time.perf_counter()
            for _ in range(count):
                small.add_(1.0)
            issued = time.perf_counter() - started
            wait(device)
            part.note(microseconds=1e6 * issued / count)


if __name__ == "__main__":
    main()
