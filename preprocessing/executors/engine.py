"""Where the workers of a stage run."""

from typing import Literal

Engine = Literal["local", "ray"]  # processes of this machine, or actors of a Ray cluster
