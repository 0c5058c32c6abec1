"""`ModelConfig`: which model is trained, the LoRA on it or none, and the mesh of devices that share it."""

from dataclasses import dataclass

from .settings import accept_aliases, check_types, require, setting

TINY_NAME = "tiny"  # the name of the model that is made here, offline
STORED_DTYPES = ("float32", "bfloat16")  # of weights on disk
DTYPES = ("auto", *STORED_DTYPES)
GEMMA3_SIZES = ("270m", "1b", "4b", "12b", "27b")


@accept_aliases
@dataclass
class ModelConfig:
    """Settings of the model, of the LoRA on it, and of the mesh of devices that share it.

    `model_size` is a short name of an instruction-tuned Gemma 3, which sets `model_name`. `mesh_shape` is given as
    "2,4" with `mesh_axes` "fsdp,tp", or both at once as ((2, 4), ("fsdp", "tp")).
    """

    model_name: str = setting(TINY_NAME, "a Hugging Face model: hub id or folder; 'tiny' is made here, offline")
    model_size: str | None = setting(None, "a Gemma 3 by its size, instead of model_name: " + ", ".join(GEMMA3_SIZES))
    model_dtype: str = setting(
        "auto", "of the base weights: auto (bfloat16 on TPU and CUDA with a LoRA, else float32), float32, bfloat16"
    )
    lora_rank: int = setting(16, "rank of the LoRA matrices; 0: no LoRA, all weights are trained, in float32")
    lora_alpha: float = setting(32.0, "the LoRA's output is scaled by lora_alpha / lora_rank")
    lora_dropout: float = setting(0.0, "dropout on the LoRA's input while learning")
    mesh_shape: str | None = setting(None, "devices along each axis of the mesh, such as 2,4; none: one device")
    mesh_axes: str = setting("fsdp,tp", "what the axes of the mesh are")

    def __post_init__(self) -> None:
        self._resolve_mesh()
        check_types(self)
        if self.model_size is not None:
            hint = f"choose one of {', '.join(GEMMA3_SIZES)}"
            require(self.model_size in GEMMA3_SIZES, "model_size", self.model_size, hint)
            name = f"google/gemma-3-{self.model_size}-it"
            hint = f"model_size={self.model_size!r} means {name!r}; give one of the two"
            require(self.model_name in (type(self).model_name, name), "model_name", self.model_name, hint)
            self.model_name = name
        require(self.model_dtype in DTYPES, "model_dtype", self.model_dtype, f"choose one of {', '.join(DTYPES)}")
        require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "must be at least 1, or 0: all weights are trained")
        if self.trains_all:
            hint = "with lora_rank=0 all weights are trained, which needs float32; leave it out"
            require(self.model_dtype != "bfloat16", "model_dtype", self.model_dtype, hint)
            require(
                self.lora_dropout == 0, "lora_dropout", self.lora_dropout, "lora_rank=0 means no LoRA; leave it out"
            )
        require(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "must be above 0")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "must be in [0, 1)")

    def take_from_adapter(self, rank: int, alpha: float, dropout: float) -> None:
        """Take the LoRA's settings from the adapter that is trained further.

        Raises:
            ValueError: a setting was given another value than the adapter has.
        """
        for name, there in (("lora_rank", rank), ("lora_alpha", float(alpha)), ("lora_dropout", dropout)):
            given, default = getattr(self, name), getattr(type(self), name)
            hint = f"the adapter that is trained further, {self.model_name}, has {there!r}; give that, or leave it out"
            require(given in (default, there), name, given, hint)
            setattr(self, name, there)

    @property
    def trains_all(self) -> bool:
        """Whether all weights of the text model are trained, without a LoRA."""
        return self.lora_rank == 0

    @property
    def mesh(self) -> tuple[tuple[int, ...], tuple[str, ...]] | None:
        """Sizes and names of the mesh's axes; None: no mesh."""
        if self.mesh_shape is None:
            return None
        return tuple(int(size) for size in self.mesh_shape.split(",")), tuple(self.mesh_axes.split(","))

    def _resolve_mesh(self) -> None:
        """Turn either way to give a mesh into `mesh_shape` "2,4" and `mesh_axes` "fsdp,tp"."""
        shape, hint = self.mesh_shape, 'expected "2,4" or ((2, 4), ("fsdp", "tp"))'
        if shape is not None and not isinstance(shape, str):
            try:
                numbers, axes = shape
                self.mesh_shape = ",".join(str(int(number)) for number in numbers)
                self.mesh_axes = ",".join(axes)
            except (TypeError, ValueError):
                raise ValueError(f"mesh_shape={shape!r}: {hint}") from None
        names = str(self.mesh_axes).split(",")
        require(set(names) <= {"fsdp", "tp"}, "mesh_axes", self.mesh_axes, "the axes are fsdp, tp")
        if shape is not None:
            sizes = self.mesh_shape.split(",")
            good = all(size.strip().isdigit() and int(size) >= 1 for size in sizes)
            require(good and len(sizes) == len(names), "mesh_shape", shape, hint)
