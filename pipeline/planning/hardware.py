"""What GPUs and networks can do by their data sheets, and the share of it that work reaches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.schema import ConfigError

# Dense bf16 peak by data sheet, TFLOP/s: the denominator of "mfu".
PEAK_TFLOPS: Mapping[str, float] = {
    "H100": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H200": 989.4,
    "H800": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
    "GB200": 2500.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "A40": 149.7,
    "MI300X": 1307.4,
}
_MEMORY_AND_LINKS: Mapping[str, tuple[float, float, float]] = {
    "H100": (80, 3350, 450),
    "H200": (141, 4800, 450),
    "B200": (180, 7700, 900),
    "A100": (80, 2039, 300),
    "L40S": (48, 864, 32),
    "MI300X": (192, 5300, 448),
}
"""Memory in GB, its bandwidth in GB/s, and the bandwidth to the other GPUs of the node in GB/s and direction."""
GPU_NAMES = tuple(_MEMORY_AND_LINKS)
"""The GPUs whose memory and links are known."""


def known_peak(name: str) -> float | None:
    """Return the peak FLOP/s of a device by its name: the longest entry that is a word of it."""
    known = [part for part in PEAK_TFLOPS if re.search(rf"\b{part}\b", name)]
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


@dataclass(frozen=True)
class Hardware:
    """A cluster of one kind of GPU, and the share of each limit that training reaches.

    The limits are data sheets'. The shares are assumptions, typical of bf16 training on large matrices. None was
    measured with this project.
    """

    gpu: str = "H100"
    gpus_per_node: int = 8
    network_gbs: float = 50.0
    """Network of one GPU in GB/s and direction: 50 is 400 Gb/s."""
    matrix_share: float = 0.65
    """Of the peak FLOP/s, for the matrix products of decoder and connector."""
    tower_share: float = 0.25
    """Of the peak FLOP/s, for the vision tower with all its operators: its width is small."""
    attention_share: float = 0.1
    """Of the peak FLOP/s, for attention over segments of a few hundred tokens."""
    bandwidth_share: float = 0.85
    """Of the memory's bandwidth, for operators that move data."""
    link_share: float = 0.8
    """Of the bandwidth of links, for large messages."""
    hop_us: float = 5.0
    """Latency of one hop of a ring collective or of a message."""
    host_us: float = 10.0
    """Time in which the host launches one operator."""

    def __post_init__(self) -> None:
        if self.gpu not in GPU_NAMES:
            raise ConfigError(f"GPU {self.gpu}: known are {', '.join(GPU_NAMES)}")

    @property
    def peak_flops(self) -> float:
        """Peak FLOP/s in bf16."""
        return PEAK_TFLOPS[self.gpu] * 1e12

    @property
    def memory_bytes(self) -> float:
        """Memory of a GPU."""
        return _MEMORY_AND_LINKS[self.gpu][0] * 1e9

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth that moving operators reach."""
        return _MEMORY_AND_LINKS[self.gpu][1] * 1e9 * self.bandwidth_share

    def collective_s(self, size: float, ranks: int, *, count: int = 1) -> float:
        """Return the seconds of ring collectives over consecutive ranks.

        Args:
            size: bytes that a rank holds after all gathers, or before all reduce-scatters.
            ranks: of the group.
            count: collectives that these bytes are divided among.
        """
        if ranks == 1:
            return 0.0
        nodes = -(-ranks // self.gpus_per_node)
        inside = size * (ranks - 1) / ranks / (self._link_gbs * 1e9)
        # A ring enters a node once: all its GPUs share what comes over all their network cards.
        cards = min(ranks, self.gpus_per_node) * self.network_gbs * self.link_share * 1e9
        return max(inside, size * (nodes - 1) / nodes / cards) + count * (ranks - 1) * self.hop_us * 1e-6

    def message_s(self, size: float, *, across_nodes: bool) -> float:
        """Return the seconds of a message of ``size`` bytes between two GPUs."""
        speed = self.network_gbs * self.link_share if across_nodes else self._link_gbs
        return size / (speed * 1e9) + self.hop_us * 1e-6

    @property
    def _link_gbs(self) -> float:
        return _MEMORY_AND_LINKS[self.gpu][2] * self.link_share

    def lines(self) -> list[str]:
        """Return the assumptions in words."""
        memory, bandwidth, link = _MEMORY_AND_LINKS[self.gpu]
        return [
            f"{self.gpu}: {PEAK_TFLOPS[self.gpu]:,.0f} TFLOP/s in bf16, {memory:g} GB at {bandwidth:,.0f} GB/s, "
            f"{link:g} GB/s inside a node of {self.gpus_per_node}, {self.network_gbs:g} GB/s a GPU between nodes",
            f"reached: {self.matrix_share:.0%} of the peak in matrices, {self.tower_share:.0%} in the tower, "
            f"{self.attention_share:.0%} in attention, {self.bandwidth_share:.0%} of the memory's bandwidth, "
            f"{self.link_share:.0%} of the links'; {self.hop_us:g} us a hop, {self.host_us:g} us of host an operator",
        ]
