"""How large numbers may be that people set: far beyond any use, far below what overflows or fills a machine."""

MOST = 10_000_000
"""Samples, steps, tokens, epochs: what is counted in a run has no more."""
MOST_ROWS = 1_000_000_000
HIGHEST_RANK = 16_384
LARGEST = 1e9
"""Coefficients: beyond it a loss overflows float32."""
LARGEST_SIDE = 16_384
"""Pixels of an image."""
LONGEST_PROMPT = 20_000
"""Characters of a prompt for an image, of which CLIP reads 77 tokens and T5 or Qwen3 at most 512."""
MOST_PROMPT_TOKENS = 512
"""Of T5 or Qwen3, as diffusers' pipelines allow."""
