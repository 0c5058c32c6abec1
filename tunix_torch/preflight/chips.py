"""What each TPU chip can do, and how a slice of them is named."""

import math
import re
from dataclasses import dataclass

GiB = 2**30


@dataclass(frozen=True)
class Chip:
    """Peak figures of one chip.

    Compute, HBM bandwidth and interconnect are those of Google's pages cloud.google.com/tpu/docs/v5e, /v5p and /v6e
    (the interconnect there counts both directions; here it is what a chip sends). `hbm_bytes` is the limit that
    libtpu 0.0.21 names when a program is too large ("Used 36.00G of 15.75G hbm"): the capacity less what the runtime
    keeps for itself.
    """

    name: str
    flops: float  # bfloat16, a second
    hbm_bytes: int
    hbm_bytes_per_second: float
    ici_bytes_per_second: float  # sent over all of the chip's links together
    dims: int  # of the network of chips


CHIPS = {
    "v5e": Chip("v5e", 197e12, int(15.75 * GiB), 819e9, 200e9, 2),
    "v5p": Chip("v5p", 459e12, int(95.74 * GiB), 2765e9, 600e9, 3),
    "v6e": Chip("v6e", 918e12, int(31.25 * GiB), 1640e9, 400e9, 2),
}

# What torch-xla 2.9.0 sets on a TPU before it loads libtpu (torch_xla/__init__.py, _setup_libtpu_flags).
LIBTPU_FLAGS = (
    "--xla_tpu_use_enhanced_launch_barrier=false",
    "--xla_latency_hiding_scheduler_rerun=1",
    "--xla_tpu_prefer_async_allgather_to_allreduce=true",
    "--xla_tpu_enable_flash_attention=false",
)
LIBTPU_FLAGS_V5 = ("--xla_enable_async_all_gather=true", "--xla_enable_async_collective_permute=true")


@dataclass(frozen=True)
class Topology:
    """A slice: so many chips of a kind, in a grid."""

    chip: Chip
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.sizes))}"

    @property
    def num_chips(self) -> int:
        return math.prod(self.sizes)

    @property
    def libtpu_flags(self) -> tuple[str, ...]:
        """The compiler's flags in a training process on this slice."""
        return LIBTPU_FLAGS + (LIBTPU_FLAGS_V5 if self.chip.name in ("v5e", "v5p") else ())


def parse_topology(text: str) -> Topology:
    """A slice from its name, such as "v5e:2x4" or "v5p:2x2x1".

    Raises:
        ValueError: no such chip or slice.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if match is None or match[1] not in CHIPS:
        raise ValueError(f"topology={text!r}: expected a chip ({', '.join(CHIPS)}) and its grid, such as v5e:2x4")
    chip, sizes = CHIPS[match[1]], tuple(int(size) for size in match[2].split("x"))
    good = all(size in (1, 2, 4, 8, 16) for size in sizes)
    if len(sizes) != chip.dims or not good or math.prod(sizes) > 256:
        example = "2x2x1" if chip.dims == 3 else "2x4"
        raise ValueError(
            f"topology={text!r}: a {chip.name} slice has {chip.dims} sizes, each 1, 2, 4, 8 or 16, and at most "
            f"256 chips here, such as {chip.name}:{example}"
        )
    return Topology(chip, sizes)
