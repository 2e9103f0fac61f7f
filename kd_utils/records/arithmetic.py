"""What the last bits of a sum depend on: the kind of CPU or GPU, its libraries, the threads.

Virtual machines hide the name of their CPU: two that call themselves "AMD EPYC" may round
differently. So a record has what torch and the system say, and on a CPU a digest of what a few
fixed operations gave.
"""

import hashlib
import platform
import re
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

#: The starts of CPU flags that choose between kernels.
EXTENSIONS = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "fp16", "bf16", "sve", "i8mm")


def arithmetic(device: str) -> dict[str, Any]:
    """What rounds the sums of this process; torch must be imported.

    Args:
        device: "cuda": the current GPU by name and compute capability, CUDA, cuDNN, and whether
            only deterministic algorithms are used; "cpu": the CPU and its vector extensions, what
            torch uses of them, the BLAS, the threads, and the digest of a probe.
    """
    torch = sys.modules["torch"]
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return {
            "gpu": torch.cuda.get_device_name(),
            "capability": f"{major}.{minor}",
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
    threads = torch.get_num_threads()
    return {
        "cpu": cpu_name(),
        "extensions": " ".join(_extensions()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "blas": _blas(torch.__config__.show()),
        "threads": threads,
        "probe": _probe(threads),
    }


def cpu_name() -> str:
    """The kind of CPU, with family, model and stepping where the system tells them."""
    said = _cpuinfo()
    with suppress(KeyError):
        numbers = {"family": "cpu family", "model": "model", "stepping": "stepping"}
        known = [f"{name} {said[key]}" for name, key in numbers.items() if key in said]
        return ", ".join([said["model name"], *known])
    return platform.processor() or platform.machine()


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first core."""
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        return dict(re.findall(r"(?m)^(\w[\w ]*?)\s*: ?(.*)$", first))
    return {}


def _extensions() -> list[str]:
    said = _cpuinfo()
    flags = f"{said.get('flags', '')} {said.get('Features', '')}".split()
    return sorted({flag for flag in flags if flag.startswith(EXTENSIONS)})


def _blas(built_with: str) -> str:
    """The libraries of matrix products: "mkl (Math Kernel Library Version 2024.2, MKL-DNN v3)"."""
    names = re.findall(r"(?:Math Kernel Library Version|MKL-DNN|OpenBLAS) v?[\w.]+", built_with)
    uses = re.search(r"BLAS_INFO=(\w+)", built_with)
    return f"{uses[1] if uses else 'unknown'} ({', '.join(names)})"


@lru_cache
def _probe(threads: int) -> str:
    """Twelve hex digits of what fixed operations give with so many threads, to the last bit.

    They are those of a training step: matrix products, attention, norms, exponentials, long sums.
    No random number is drawn.
    """
    import torch
    import torch.nn.functional as F

    numbers = torch.arange(384 * 512) * 7919 % 1013
    x = (numbers.float() / 1013 - 0.5).view(384, 512)
    w = x.flip(0).t()  # (512, 384)
    heads = x.view(1, 4, 96, 512)[..., :64]
    with torch.inference_mode():
        product = x @ w
        results = [
            product,
            product.log_softmax(-1),
            (x[:64, :96].bfloat16() @ w[:96, :64].bfloat16()).float(),
            F.scaled_dot_product_attention(heads, heads, heads, is_causal=True),
            F.layer_norm(x, x.shape[-1:]),
            x.square().mean(-1).rsqrt(),
            F.silu(x),
            F.gelu(x),
            x.exp().sum(),
        ]
    text = b"".join(result.contiguous().numpy().tobytes() for result in results)
    return hashlib.sha256(text).hexdigest()[:12]
