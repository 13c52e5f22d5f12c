"""Settings that every method shares; each method has one pydantic model, whose problems are told all at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    PlainSerializer,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import PydanticKnownError

from diffusion_align.bounds import HIGHEST_RANK, MOST
from diffusion_align.errors import short
from diffusion_align.interrupt import GRACE
from diffusion_align.training.aliases import other_words
from diffusion_align.training.optimizers import OptimizerName, optimizer_checks
from diffusion_align.training.section import Beta, Folder, OrInfinite, Section

Content = Literal[
    "method",
    "model",
    "reference_model",
    "prompts",
    "dataset",
    "eval_dataset",
    "pairs",
    "reward",
    "evaluation",
    "sampler",
    "family",
]
"""Settings that name what lies elsewhere and may change there."""


FP16_NEEDS_GPU = "mixed_precision='fp16' needs a GPU: use no, bf16 or auto"
LearningRate = Annotated[
    float,
    Field(gt=0, le=1000, description="learning rate after the warm-up; with prodigy a factor, usually 1"),
]
AUTO = "auto"


def _number_or_auto(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    if value == AUTO:
        return value
    try:
        return handler(value)
    except ValidationError as error:  # of the number and of the word
        first = error.errors()[0]
        raise PydanticKnownError(first["type"], first.get("ctx")) from None  # type: ignore[arg-type]


if TYPE_CHECKING:
    BatchSize = int
else:
    BatchSize = Annotated[Annotated[int, Field(ge=1, le=MOST)] | Literal["auto"], WrapValidator(_number_or_auto)]
"""A number; until a run has measured it ``AUTO``, which only those have to know that see settings before."""
BATCH_SIZES = ("sample_batch_size", "micro_batch_size")
PLUG_INS = "diffusion_align.methods"
"""Group of the entry points by which installed packages bring methods."""


def multiple_checks(config: TrainingConfig, divisor: str, processes: int = 1) -> Iterator[str]:
    """A sentence if ``samples_per_epoch`` is not a multiple of the setting ``divisor``, in each of ``processes``."""
    count, size = config.samples_per_epoch, getattr(config, divisor)
    if count % ((1 if size == AUTO else size) * processes):
        each = f"{divisor}={size}" if processes == 1 else f"{processes} processes x {divisor}={size}"
        yield f"samples_per_epoch={count} is not a multiple of {each}: change one of them"


class TrainingConfig(Section):
    """What every trainer shares. Counts are global: with P processes each does a P-th of them."""

    model_kind: ClassVar[Literal["image", "text", "classifier"] | None] = None
    """What is loaded for the method to train; None: it loads that itself."""
    dataset_kind: ClassVar[Literal["preferences", "labels"]] = "preferences"
    """What a row of its ``dataset`` says."""

    method: str = Field("", description="what trains: a shipped method's name, module:Class or file.py:Class")
    model: str = Field(description="embedded name, folder or Hub id of the model to align")
    output_dir: Folder = Field(description="the run folder; must be new or empty unless `resume` is set")
    resume: bool = Field(
        False, strict=True, description="continue the run in output_dir from its newest checkpoint, bit for bit"
    )
    accept_changed: list[Content] = Field(
        default_factory=list, description="settings whose content may have changed since the run began"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of all randomness: the same seed gives the same run")
    epochs: int = Field(100, ge=1, le=MOST, description="rounds of collect, score, estimate, update")

    samples_per_epoch: int = Field(64, ge=1, le=MOST, description="samples per epoch, of all processes together")
    sample_batch_size: BatchSize = Field(
        8, description="samples that each process generates at once; auto measures it when an image run starts"
    )
    micro_batch_size: BatchSize = Field(
        8,
        description="samples, or (sample, step) indices of images, per forward and backward pass; auto measures it "
        "when an image run starts",
    )
    updates_per_epoch: int = Field(2, ge=1, le=MOST, description="optimizer steps in one pass over an epoch's samples")
    inner_epochs: int = Field(1, ge=1, le=MOST, description="passes over an epoch's samples")

    optimizer: Annotated[OptimizerName, other_words(adamw_torch="adamw", adamw_bnb_8bit="adamw_8bit")] = Field(
        "adamw",
        description="adamw; adamw_8bit or adafactor, whose state is smaller; prodigy, which finds the learning rate",
    )
    learning_rate: LearningRate = 3e-4
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="schedule after the warm-up: linear and cosine fall to 0 at the last update"
    )
    warmup_steps: int = Field(0, ge=0, le=MOST, description="updates in which the learning rate rises from 0")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay of the two moments per update")
    weight_decay: float = Field(1e-4, ge=0, le=1000, description="weight decay, decoupled from the gradient")
    max_grad_norm: OrInfinite = Field(
        1.0, gt=0, description="largest gradient norm; longer gradients are scaled down; .inf for none"
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="average the trained weights; used for grids and final/"
    )
    ema_offload: bool = Field(
        False, strict=True, description="keep that average in main memory; each update copies the weights"
    )

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] | None = Field(
        None,
        description="precision of the network; log-probs stay float32; null is bf16 on a GPU that has it, else no; "
        "auto also measures whether bf16 is faster on this CPU",
    )
    gradient_checkpointing: bool = Field(
        False,
        strict=True,
        description="keep only the input of each layer for the backward pass, which recomputes the rest: less memory, "
        "one more forward pass, the same gradients",
    )
    tf32: bool = Field(
        False,
        strict=True,
        description="float32 matrix products in TF32, on NVIDIA GPUs since Ampere: faster, relative errors of 1e-3",
    )
    num_threads: int | None = Field(
        None, ge=1, le=1024, description="torch's CPU threads; its own default if not given"
    )
    checkpoint_every: int = Field(10, ge=1, le=MOST, description="epochs between checkpoints")
    checkpoint_minutes: float | None = Field(
        10.0,
        gt=0,
        le=525_600,
        description="minutes after the last checkpoint when one is written in any case; null for never",
    )
    interrupt_grace: float = Field(
        GRACE, ge=0, le=86_400, description="seconds for a reward to answer after the run received an interrupt"
    )
    keep_checkpoints: int = Field(2, ge=1, le=MOST, description="number of newest checkpoints to keep")
    grid_every: int = Field(
        10,
        ge=0,
        le=MOST,
        description="epochs between previews, images or texts of the fixed prompts; the last epoch always has one; "
        "0 for none but before_after, at the end",
    )
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="where metrics are logged besides metrics.jsonl"
    )
    callbacks: Annotated[list[Any], PlainSerializer(lambda given: [one for one in given if isinstance(one, str)])] = (
        Field(default_factory=list, description="module:Class or file.py:Class of each; in Python also objects")
    )

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML 1.1 reads a bare `no` as false

    def cross_checks(self) -> Iterator[str]:
        own = type(self).model_fields["method"].default
        if own and self.method != own and ":" not in self.method and not entry_points(group=PLUG_INS, name=self.method):
            yield f"method={short(self.method)} does not fit {type(self).__name__}, which is for {own!r}: leave it out"
        if self.mixed_precision == "fp16":
            import torch

            if not torch.cuda.is_available():
                yield FP16_NEEDS_GPU
        if self.tf32:
            import torch

            if not torch.cuda.is_available():
                yield "tf32=true needs a GPU: leave it out"
        for name in self.trackers:
            if importlib.util.find_spec(name) is None:
                yield f"trackers: {name} is not installed: pip install 'diffusion-align[{name}]'"
        yield from optimizer_checks(self)
        if self.ema_offload and self.ema_decay is None:
            yield "ema_offload has no effect without ema_decay: set ema_decay, or leave it out"
        yield from multiple_checks(self, "sample_batch_size")
        for size in BATCH_SIZES if self.model_kind != "image" else ():
            if getattr(self, size) == AUTO:
                yield f"{size}=auto is measured with image models alone: give a number"
        if self.updates_per_epoch > self.samples_per_epoch:
            yield (
                f"updates_per_epoch={self.updates_per_epoch} is more than samples_per_epoch={self.samples_per_epoch}: "
                "each update needs at least one sample"
            )


class LoRASettings(Section):
    """Low-rank adapters; a policy's own ``LoRAConfig`` says on which layers."""

    rank: int = Field(8, ge=1, le=HIGHEST_RANK, description="rank of every adapter")
    alpha: int | None = Field(None, ge=1, le=MOST, description="scale is alpha / rank; alpha is the rank if not given")
    dora: bool = Field(
        False, strict=True, description="train magnitude and direction of each layer's weights separately (DoRA)"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of each adapter's input, in training passes only")


class PolicyConfig(TrainingConfig):
    """What every method that trains a diffusion model or a language model has."""

    show_prompts: list[Any] | None = None
    lora: LoRASettings | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="dtype of frozen weights (trained ones are float32); null is bfloat16 where a GPU trains LoRA in "
        "bf16, else float32",
    )

    def cross_checks(self) -> Iterator[str]:
        if self.show_prompts is not None and not self.show_prompts:
            yield "show_prompts is empty: leave it out, or set grid_every=0 for no samples"
        if self.dtype not in (None, "float32") and self.lora is None:
            yield f"dtype={self.dtype} is for frozen weights, but lora=null trains all weights: leave one of them out"
