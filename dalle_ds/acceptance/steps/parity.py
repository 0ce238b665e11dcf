"""Export parity: weights written from a GPU engine give that engine's losses on a CPU, as `dalle-ds export` requires."""

import tempfile
from pathlib import Path

from safetensors.torch import save_file

from dalle_ds.acceptance.engines import make_engine
from dalle_ds.acceptance.place import Place
from dalle_ds.acceptance.record import Record
from dalle_ds.acceptance.sizes import random_batch, small_prior
from dalle_ds.errors import DataError
from dalle_ds.parallel.checkpoint_layout import WEIGHTS
from dalle_ds.parallel.ranks import join, leave
from dalle_ds.parallel.saved_state import open_state
from dalle_ds.storage.names import PRIOR_FILE
from dalle_ds.storage.weights import open_weights, write_weights
from dalle_ds.training.prior.parity import PARITY_FILE, prove_parity

UPDATES, LEARNING_RATE = 4, 1e-2
"""A few large updates spread the logits as far as in a trained model, so that rounding changes losses by as much."""


def run(record: Record, is_rehearsal: bool) -> None:
    place = Place(is_rehearsal)
    ranks = join()
    config = small_prior(place)
    engine = make_engine(place, ranks, config, micro_batch=2)
    for seed in range(UPDATES):
        engine.update([random_batch(config, 2, seed)], LEARNING_RATE)
    text_BT, image_BN = random_batch(config, 4, 99)
    nll_BN = engine.image_nll(text_BT, image_BN)
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), str(Path(name, PRIOR_FILE))
        engine.save(folder, {})
        save_file({"text": text_BT, "image": image_BN, "image_nll": nll_BN}, folder / PARITY_FILE)
        state = open_state(folder).whole(WEIGHTS)
        write_weights(model, kind="prior", config=config.model_dump(), state=state)
        why = "no export is written without this proof; the engine and the CPU sum and round fp16 in different orders"
        try:
            proof = prove_parity(str(folder), config, open_weights(model, "prior").tensors, fp16_branches=True)
        except DataError as error:
            record.must("parity proof", str(error), False, "passes", why)
        else:
            record.must("parity proof", "passes", True, "passes", why)
            for key, value in proof.items():
                record.tell(key.replace("_", " "), value)
    leave()
