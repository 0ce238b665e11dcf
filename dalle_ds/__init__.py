"""dalle_ds: train the original DALL-E (Ramesh et al. 2021) from raw images to samples.

`dalle_ds.load` opens a trained model, and `dalle_ds.data.open` opens a token data set. launchers/PYTHON.md shows every call.
Names that are not in `__all__` are private.
"""

from dalle_ds.lazy import lazy_names

__version__ = "0.1.0"

_HOMES = {
    "load": "dalle_ds.interface.loading",
    "load_scorer": "dalle_ds.interface.loading",
    "Model": "dalle_ds.interface.model",
    "Sample": "dalle_ds.interface.model",
    "Loss": "dalle_ds.interface.model",
    "Scorer": "dalle_ds.sampling.scorer",
    "UserError": "dalle_ds.errors",
    "data": "dalle_ds.data",
}
__all__ = ["Loss", "Model", "Sample", "Scorer", "UserError", "__version__", "data", "load", "load_scorer"]  # noqa: F822

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
