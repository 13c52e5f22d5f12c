"""Import this package as ``diffusion_align.rewards``; the bare name belongs to your own code."""

if __name__ == "rewards":
    raise ImportError("import diffusion_align.rewards, not rewards: the bare name is left to your own folders")
