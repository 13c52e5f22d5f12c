"""Entry points for people.

Import this package as ``diffusion_align.pipelines``; the bare name belongs to your own code.
"""

if __name__ == "pipelines":
    raise ImportError("import diffusion_align.pipelines, not pipelines: the bare name is left to your own folders")

from diffusion_align.pipelines.image import ImageAlignmentPipeline
from diffusion_align.pipelines.text import TextAlignmentPipeline

__all__ = ["ImageAlignmentPipeline", "TextAlignmentPipeline"]
