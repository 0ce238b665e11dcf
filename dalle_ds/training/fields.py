"""Settings that the recipes of all three trainers have. A trainer's config adds its default."""

from typing import Annotated

from pydantic import Field

CheckpointEvery = Annotated[int, Field(ge=1, description="updates between checkpoints")]
CheckpointsKept = Annotated[int, Field(ge=1, description="number of newest checkpoints to keep")]
ValidationEvery = Annotated[int, Field(ge=1, description="updates between validations")]
ValidationImages = Annotated[int, Field(ge=1, description="maximum number of validation images")]
MetricsEvery = Annotated[int, Field(ge=1, description="updates between logged metrics")]
UpdatesWithoutStep = Annotated[
    int,
    Field(
        ge=1,
        description="consecutive updates with Inf or NaN in the loss or the gradients, which are skipped, after which the run "
        "stops. In fp16 each of them halves the loss scale",
    ),
]
