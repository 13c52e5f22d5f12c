"""Entry points for people.

Import this package as ``diffusion_align.pipelines``; the bare name belongs to your own code.
"""

if __name__ == "pipelines":
    raise ImportError("import diffusion_align.pipelines, not pipelines: the bare name is left to your own folders")

from typing import TYPE_CHECKING

from diffusion_align.lazy import offered

if TYPE_CHECKING:
    from diffusion_align.pipelines.image import ImageAlignmentPipeline
    from diffusion_align.pipelines.text import TextAlignmentPipeline

__all__ = ["ImageAlignmentPipeline", "TextAlignmentPipeline"]
__getattr__, __dir__ = offered(
    __name__,
    {
        "ImageAlignmentPipeline": "diffusion_align.pipelines.image",
        "TextAlignmentPipeline": "diffusion_align.pipelines.text",
    },
)
