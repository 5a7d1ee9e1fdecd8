"""What a quantizer did to each weight and each layer; goes into the bundle's `quantization.json`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class QuantReport:
    """Figures of weights are the weight's own SQNR in dB after quantization."""

    quantized: dict[str, float] = field(default_factory=dict)
    kept_float: dict[str, str] = field(default_factory=dict)
    """Weight -> why it, or the activations of its layer, stayed float."""
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Tensor whose activations became uint8 -> least and largest value that its codes stand for."""
    bits: dict[str, int] = field(default_factory=dict)
    """Weight -> bits of each of its values, where the quantizer chose among several."""
    sensitivity: dict[str, float] = field(default_factory=dict)
    """Weight -> SQNR in dB of the outputs if only it, or its group of neighbours, had the fewest bits."""
    notes: dict[str, float] = field(default_factory=dict)
    """Other figures that the quantizer decided by, by name."""
