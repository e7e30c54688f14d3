"""Measure what the accelerator can do without any of this project: products of matrices, a copy, attention.

    python kernels.py OUT.json [--attention] [--quick]     # attention alone; sizes for a CPU

OUT.json  machine; tflops: of a product of two square matrices in float32, TF32 and bfloat16; data_sheet: what its maker
          names, where machine.py knows the card; copy_gb_per_second: read and written; attention: milliseconds of
          forward and backward in bfloat16 at lengths that are new, and at the same ones again, causal, without and with
          a mask, and with shared key heads; decoding: milliseconds for one token at growing lengths, new and again.
          PyTorch reads the order of its kernels, TORCH_CUDNN_SDPA_DEPRIORITIZED, once in a process.
"""

import json
import sys
import time
from pathlib import Path

import torch
from machine import DATA_SHEET
from torch.nn.functional import scaled_dot_product_attention

GPU, quick = torch.cuda.is_available(), "--quick" in sys.argv
DEVICE = "cuda:0" if GPU else "cpu"


def measure(function) -> float:
    """Seconds that one call takes."""
    if GPU:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure_product(dtype: torch.dtype, size: int) -> float:
    """TFLOP/s, the most of ten."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(measure(lambda: a @ b) for _ in range(10)) / 1e12


def measure_copy(count: int) -> float:
    """GB/s of a copy on the device, bytes read and bytes written."""
    source = torch.empty(count, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * count / min(measure(lambda: target.copy_(source)) for _ in range(10)) / 1e9


def draw(heads: int, length: int) -> torch.Tensor:
    """[4, heads, length, 128] in bfloat16."""
    return torch.randn(4, heads, length, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)


def attend(length: int, key_heads: int, masked: bool) -> tuple[float, float, bool]:
    """Milliseconds of forward and of backward, and whether all gradients are finite."""
    heads = 4 if quick else 32
    tensors = draw(heads, length), draw(key_heads, length), draw(key_heads, length)
    mask = torch.ones(4, 1, length, length, dtype=torch.bool, device=DEVICE).tril() if masked else None
    options = {"attn_mask": mask, "is_causal": not masked, "enable_gqa": key_heads != heads}
    out = []
    forward = measure(lambda: out.append(scaled_dot_product_attention(*tensors, **options)))
    backward = measure(lambda: out[0].sum().backward())
    return 1e3 * forward, 1e3 * backward, all(bool(tensor.grad.isfinite().all()) for tensor in tensors)


@torch.no_grad()
def decode(length: int) -> float:
    """Milliseconds for one new token that looks at so many."""
    heads = 4 if quick else 32
    query, keys = (torch.randn(1, heads, count, 128, device=DEVICE, dtype=torch.bfloat16) for count in (1, length))
    return 1e3 * measure(lambda: scaled_dot_product_attention(query, keys, keys))


def measure_attention() -> dict:
    heads, found = (4 if quick else 32), {}
    kinds = {"causal": (heads, False, 0), "masked": (heads, True, 6), "shared keys": (heads // 4, False, 0)}
    for name, (key_heads, masked, more) in kinds.items():
        attend(64 if quick else 512, key_heads, masked)
        # One is 64 above a multiple of 128, where cuDNN's backward with a mask gave NaN (pytorch 196678).
        lengths = [(length // 16 if quick else length) + more for length in (611, 733, 847, 901, 954)]
        turns = [[attend(length, key_heads, masked) for length in lengths] for _ in range(2)]
        found[name] = {
            **{turn: [each[:2] for each in times] for turn, times in zip(("new", "again"), turns, strict=True)},
            "finite": all(each[2] for times in turns for each in times),
        }
    decode(500)
    lengths = range(501, 521)
    found["decoding"] = {turn: [decode(length) for length in lengths] for turn in ("new", "again")}
    return found


def main() -> None:
    name = f"{torch.cuda.get_device_name() if GPU else 'the CPU'}, PyTorch {torch.__version__}"
    found = {"machine": name, "data_sheet": DATA_SHEET.get(name.split(",")[0], {})}
    if "--attention" not in sys.argv:
        size, found["tflops"] = 512 if quick else 8192, {}
        for name, dtype in (("float32", torch.float32), ("TF32", torch.float32), ("bfloat16", torch.bfloat16)):
            if name == "TF32" and (torch.version.hip or not GPU):
                continue
            torch.backends.cuda.matmul.allow_tf32 = name == "TF32"
            found["tflops"][name] = measure_product(dtype, size)
        torch.backends.cuda.matmul.allow_tf32 = False
        found["copy_gb_per_second"] = measure_copy(2**24 if quick else 2**32)
    found["attention"] = measure_attention()
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
