"""Peak figures of the TPU chips that jobs are planned for, and the names of slices of them, such as v5e:2x4."""

import math
import re
from dataclasses import dataclass

GiB = 2**30


@dataclass(frozen=True)
class Chip:
    """Peak figures of one chip.

    Compute, HBM bandwidth and interconnect bandwidth come from Google's pages cloud.google.com/tpu/docs/v5e, /v5p and
    /v6e. Those pages count both directions of the interconnect; here only what a chip sends is counted. `hbm_bytes`
    is the limit that libtpu 0.0.21 names when a program is too large ("Used 36.00G of 15.75G hbm"). It is the chip's
    capacity less what the runtime keeps for itself.
    """

    name: str
    flops: float  # bfloat16 operations a second
    hbm_bytes: int
    hbm_bytes_per_second: float
    ici_bytes_per_second: float  # that a chip sends over all of its links together
    dims: int  # dimensions of the grid in which the chips are connected


CHIPS = {
    "v5e": Chip("v5e", 197e12, int(15.75 * GiB), 819e9, 200e9, 2),
    "v5p": Chip("v5p", 459e12, int(95.74 * GiB), 2765e9, 600e9, 3),
    "v6e": Chip("v6e", 918e12, int(31.25 * GiB), 1640e9, 400e9, 2),
}

# torch-xla 2.9.0 sets these flags on a TPU before it loads libtpu (torch_xla/__init__.py, _setup_libtpu_flags).
LIBTPU_FLAGS = (
    "--xla_tpu_use_enhanced_launch_barrier=false",
    "--xla_latency_hiding_scheduler_rerun=1",
    "--xla_tpu_prefer_async_allgather_to_allreduce=true",
    "--xla_tpu_enable_flash_attention=false",
)
LIBTPU_FLAGS_V5 = ("--xla_enable_async_all_gather=true", "--xla_enable_async_collective_permute=true")


@dataclass(frozen=True)
class Topology:
    """A slice: a grid of TPU chips of one kind that work on one job."""

    chip: Chip
    sizes: tuple[int, ...]  # chips along each dimension of the grid

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.sizes))}"

    @property
    def num_chips(self) -> int:
        return math.prod(self.sizes)

    @property
    def libtpu_flags(self) -> tuple[str, ...]:
        """The flags that the compiler has in a training process on this slice."""
        return LIBTPU_FLAGS + (LIBTPU_FLAGS_V5 if self.chip.name in ("v5e", "v5p") else ())


def parse_topology(text: str) -> Topology:
    """Return the slice that a name such as "v5e:2x4" or "v5p:2x2x1" means.

    Raises:
        ValueError: there is no such chip, or no such slice of it.
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
