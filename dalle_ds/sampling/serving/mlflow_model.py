"""An export as an MLflow model that takes captions and returns PNG files. MLflow runs this file when it loads the model."""

import io
from threading import Lock
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from dalle_ds.ops.devices import default_device
from dalle_ds.sampling.export import load_export
from dalle_ds.sampling.request import Request
from dalle_ds.sampling.sampler import Sampler
from dalle_ds.sampling.scorer import load_scorer
from dalle_ds.sampling.settings import SampleOptionsConfig


class CaptionsToImages(PythonModel):
    """Samples the same images as `dalle-ds sample` with the same captions, settings and `batch`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the export and, if it was registered with a CLIP, the scorer."""
        device = default_device()
        clip = context.artifacts.get("clip")
        scorer = load_scorer(clip, device) if clip else None
        self._sampler, self._one_at_a_time = Sampler(load_export(context.artifacts["export"], device), scorer), Lock()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Sample images. Returns one row per image: caption, candidate, seed, score (None without a CLIP), png (file bytes).

        Args:
            model_input: table with a column "caption".
            params: fields of `SampleOptionsConfig`. keep 0 keeps all candidates.
        """
        given = dict(params or {})
        options = SampleOptionsConfig(**{**given, "keep": given.get("keep") or None})
        with self._one_at_a_time:
            settings = options.for_prior(self._sampler.export.record.sampling)
            request = Request(tuple(model_input["caption"]), settings)
            chosen = [candidate for row in self._sampler.draw(request) for candidate in row]
            images = self._sampler.images(chosen)
        rows = [
            (request.captions[it.index.caption], it.index.candidate, it.seed, it.score, _png(image))
            for it, image in zip(chosen, images, strict=True)
        ]
        return pd.DataFrame(rows, columns=["caption", "candidate", "seed", "score", "png"])


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format="png")
    return file.getvalue()


set_model(CaptionsToImages())
