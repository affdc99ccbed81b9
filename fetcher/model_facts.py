"""What a model folder tells of its model: Hugging Face's ``config.json``, safetensors headers.

Only what the files say is told. Files are read with limits and believed in nothing: one that
cannot be understood tells nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

_MAX_CONFIG: Final = 4 * 1024 * 1024
_MAX_HEADER: Final = 64 * 1024 * 1024
_MAX_TEXT: Final = 128

_PRECISIONS: Final = {
    "F64": "fp64",
    "F32": "fp32",
    "F16": "fp16",
    "BF16": "bf16",
    "F8_E4M3": "fp8",
    "F8_E5M2": "fp8",
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8",
    "int8": "int8",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known; an empty text is what is not."""

    family: str = ""
    architecture: str = ""
    format: str = ""
    precision: str = ""
    quantization: str = ""
    param_size: str = ""


def read_facts(config: Path | None, weights: list[Path]) -> Facts:
    """The facts of a ``config.json`` and of the safetensors files among ``weights``. Blocking."""
    document = _config(config) if config else _ConfigDocument()
    headers = [_header(path) for path in weights if path.suffix.lower() == ".safetensors"]
    counted = _count(headers) if headers and all(one is not None for one in headers) else Counter()
    quantized = document.quantization_config
    declared = _PRECISIONS.get(document.dtype or document.torch_dtype or "", "")
    return Facts(
        family=(document.model_type or "")[:_MAX_TEXT],
        architecture=document.architectures[0][:_MAX_TEXT] if document.architectures else "",
        # of quantized weights only the scales have the type that is declared
        precision="" if quantized else _precision(counted) or declared,
        quantization=quantized.quant_method[:_MAX_TEXT] if quantized else "",
        # packed weights have fewer elements than the model has parameters
        param_size="" if quantized else _param_size(counted),
    )


class _Quantization(msgspec.Struct):
    quant_method: str = ""


class _ConfigDocument(msgspec.Struct):
    model_type: str | None = None
    architectures: list[str] | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    quantization_config: _Quantization | None = None


class _Tensor(msgspec.Struct):
    dtype: str = ""
    shape: list[int] = []


def _config(path: Path) -> _ConfigDocument:
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_CONFIG), type=_ConfigDocument)
    except (OSError, msgspec.DecodeError, UnicodeError, RecursionError):
        return _ConfigDocument()


def _header(path: Path) -> dict[str, _Tensor] | None:
    """The tensors of a safetensors file: eight bytes of length, then that much JSON."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER:
                return None
            # __metadata__ is texts; as a tensor it has neither type nor shape, so it counts nothing
            return msgspec.json.decode(file.read(length), type=dict[str, _Tensor])
    except (OSError, msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def _count(headers: list[dict[str, _Tensor] | None]) -> Counter[str]:
    """Elements by data type."""
    elements: Counter[str] = Counter()
    for header in headers:
        for tensor in (header or {}).values():
            if tensor.dtype:
                elements[tensor.dtype] += math.prod(tensor.shape)
    return elements


def _floats(elements: Counter[str]) -> Counter[str]:
    return Counter({key: value for key, value in elements.items() if key in _PRECISIONS})


def _precision(elements: Counter[str]) -> str:
    floats = _floats(elements)
    if not floats:
        return ""
    (first, most), *_ = floats.most_common(1)
    return _PRECISIONS[first] if most >= 0.9 * floats.total() else "mixed"


def _param_size(elements: Counter[str]) -> str:
    """As in ``22.7M``: at most one digit after the point.

    Buffers of integers are no parameters, and where they are many, nobody knows what they are.
    """
    count = _floats(elements).total()
    if not count or elements.total() > 1.01 * count:
        return ""
    for scale, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= scale:
            return f"{count / scale:.1f}".removesuffix(".0") + letter
    return ""
