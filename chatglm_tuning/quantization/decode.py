"""The products of a few rows with a weight, as decoding a token at a time needs them, and unpacking for many rows.

Such a product is bound by reading the weight. On a CPU a C kernel (`decode.c`) reads stored int4 and int8 levels once
and never writes them out as floats; it is compiled at its first use, in about half a second. On a GPU torch.compile
fuses the same.
"""

import ctypes
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MOST_ROWS = 4
"""More rows than this are served better by unpacking the weight for a matrix product."""

_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-w")
_COMPILE_SECONDS = 60
_gpu_switch = {"is_on": True}
_SPREAD_MARGIN = 128  # decode.c fills every row of x up to whole vectors

_LANES = 16  # of decode.c's vectors
_pointer, _long = ctypes.c_void_p, ctypes.c_long
_KERNELS = {
    "int8_product": (_pointer, _pointer, _pointer, _pointer, _long, _long),
    "int4_product_float": (_pointer, _pointer, _pointer, _pointer, _long, _long, _pointer),
    "int4_product_bf16": (_pointer, _pointer, _pointer, _pointer, _long, _long, _pointer),
    "bf16_product": (_pointer, _pointer, _pointer, _long, _long),
    "spread_int4_bf16": (_pointer, _pointer, _pointer, _long, _long, _long, _long),
}


def few_rows_product(states: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, bits: int) -> Tensor | None:
    """Return states · (level · scale)ᵀ + bias, summed in fp32 and rounded once to the dtype of `states`, or None.

    states: `(…, in)`; weight: int8 `(out, in)` for 8 bits, `(out, in / 2)` for 4, the even column in the high half of
        a byte; scale, bias: `(out,)`.
    None where there are more than `MOST_ROWS` rows, where a gradient is wanted, and where nothing can be compiled,
    which is logged once: take another way then.
    """
    row_count = states.numel() // states.shape[-1]
    if row_count > MOST_ROWS or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    rows = states.reshape(row_count, -1)
    product = None
    if states.is_cuda:
        product = _product_on_gpu(rows, weight, scale, bits)
    elif states.device.type == "cpu" and weight.is_contiguous() and (kernels := _load_kernels()) is not None:
        product = _product_on_cpu(kernels, rows, weight, scale, bits)
    return None if product is None else product.add_(bias).to(states.dtype).view(*states.shape[:-1], -1)


def few_rows_of_head(states: Tensor, weight: Tensor) -> Tensor | None:
    """Return states · weightᵀ, summed in fp32 and rounded once, or None where another way must be taken.

    states: bf16 `(…, in)` on a CPU; weight: bf16 `(out, in)`. oneDNN would copy the whole weight for a single row.
    """
    row_count = states.numel() // states.shape[-1]
    is_bf16 = states.dtype == weight.dtype == torch.bfloat16 and states.device.type == "cpu"
    if not is_bf16 or row_count > MOST_ROWS or torch.is_grad_enabled() or weight.shape[1] % _LANES:
        return None
    kernels = _load_kernels() if weight.is_contiguous() else None
    if kernels is None:
        return None
    rows = states.reshape(row_count, -1).float()
    product = torch.empty(row_count, weight.shape[0])
    for row, result in zip(rows, product, strict=True):
        kernels.bf16_product(*_pointers(weight, row, result), *weight.shape)
    return product.to(states.dtype).view(*states.shape[:-1], -1)


def spread_on_cpu(packed: Tensor, even: Tensor, odd: Tensor) -> bool:
    """Do what `kernels.spread_int4` does in one pass, for bf16 on a CPU; return False where that is not possible."""
    is_fit = even.dtype == torch.bfloat16 and packed.device.type == "cpu" and packed.stride(1) == even.stride(1) == 1
    kernels = _load_kernels() if is_fit else None
    if kernels is None:
        return False
    kernels.spread_int4_bf16(*_pointers(packed, even, odd), *packed.shape, packed.stride(0), even.stride(0))
    return True


def _product_on_cpu(kernels: ctypes.CDLL, rows: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    takes_bf16 = bits == 4 and rows.dtype == torch.bfloat16 and kernels.has_bf16()
    rows = (rows if takes_bf16 else rows.float()).contiguous()
    product = torch.empty(rows.shape[0], weight.shape[0])
    shape = (*product.shape[1:], rows.shape[1])
    if bits == 8:
        for row, result in zip(rows, product, strict=True):
            kernels.int8_product(*_pointers(weight, scale, row, result), *shape)
        return product
    multiply = kernels.int4_product_bf16 if takes_bf16 else kernels.int4_product_float
    spread = torch.empty(rows.shape[1] + _SPREAD_MARGIN, dtype=rows.dtype)
    for row, result in zip(rows, product, strict=True):
        multiply(*_pointers(weight, scale, row, result), *shape, spread.data_ptr())
    return product


def _pointers(*tensors: Tensor) -> Iterator[int]:
    return (tensor.data_ptr() for tensor in tensors)


@cache
def _load_kernels() -> ctypes.CDLL | None:
    """Compile and load `decode.c`; None where that fails, which is logged."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        logger.warning("decoding with quantised weights runs without its kernels, and slower: no C compiler found")
        return None
    # The library stays loaded when its file is gone.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = Path(folder) / "decode.so"
        command = [*compiler.split(), *_FLAGS, str(_SOURCE), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
            kernels = ctypes.CDLL(str(library))
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("decoding with quantised weights runs without its kernels, and slower: %s", error)
            logger.debug("%s", getattr(error, "stderr", ""))
            return None
    for name, arguments in _KERNELS.items():
        function = getattr(kernels, name)
        function.argtypes, function.restype = arguments, None
    return kernels


@cache
def _compile_product() -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    return torch.compile(_product_to_compile, dynamic=False)


def _product_on_gpu(rows: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor | None:
    if _gpu_switch["is_on"]:
        try:
            return _compile_product()(rows, weight, scale, bits)
        except Exception as error:  # a compiler that is missing or broken shows itself in a dozen ways
            _gpu_switch["is_on"] = False
            logger.warning("decoding with quantised weights is slower: torch.compile failed (%s)", error)
    return None


def _product_to_compile(rows: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return rows · (level · scale)ᵀ, fp32 `(rows, out)`, in a form that is fused into one pass over the weight."""
    states = rows.float()[:, None, :]
    if bits == 8:
        return (states * weight.float()).sum(-1) * scale.float()
    even, odd = (weight >> 4).float(), ((weight << 4) >> 4).float()
    return (states[..., 0::2] * even + states[..., 1::2] * odd).sum(-1) * scale.float()
