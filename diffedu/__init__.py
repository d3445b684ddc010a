"""diffedu: diffusion models through SDEs, in small modules that are written to be read."""

__version__ = "0.1.0"
