"""Settings that the recipes of several trainers have. A trainer's config adds its default."""

from typing import Annotated

from pydantic import Field

from dalle_ds.recipes import Place

RawShards = Annotated[Place, Field(description="root of raw shards: a path or s3:// url")]
ValidationFraction = Annotated[
    float, Field(gt=0, lt=1, description="fraction of the groups in the validation split, which no stage trains on")
]
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
