"""The precision of products and convolutions of float32 values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 on GPUs, which has 10 bits of precision, and restore the caller's settings on exit.

    PyTorch has an older and a newer interface to these settings. Where the two differ, reading the older one raises an
    error, as in Inductor up to torch 2.10; so both are set.
    """
    cudnn: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    mkldnn: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009  (torch's stubs lack it)
    parts = (products, cudnn.conv, cudnn.rnn, mkldnn)
    newer = [part.fp32_precision for part in parts]
    older = _read(torch.get_float32_matmul_precision, "highest"), _read(lambda: cudnn.allow_tf32, True)
    products.allow_tf32 = cudnn.allow_tf32 = allowed
    for part in parts:
        part.fp32_precision = "tf32" if allowed and part is not mkldnn else "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older[0])
        cudnn.allow_tf32 = older[1]
        for part, precision in zip(parts, newer, strict=True):
            part.fp32_precision = precision


def _read(older: Callable[[], Any], initial: Any) -> Any:
    """Read the older interface; if the caller has set the newer one alone, it has its initial value."""
    try:
        return older()
    except RuntimeError:
        return initial
