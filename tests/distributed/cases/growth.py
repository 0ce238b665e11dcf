"""Updates of the real engine on one rank. The memory use after every hundred updates is written as JSON to the given folder."""

import ctypes
import gc
import json
import sys
from pathlib import Path

from deepspeed.runtime.zero import parameter_offload

from dalle_ds.optim.ema import EMA, EMAConfig
from dalle_ds.parallel.activation_checkpointing import recompute_layers
from dalle_ds.parallel.ranks import join, leave
from tests.distributed.cases import engine as engine_cases
from tests.distributed.cases.engine import ADAMW, PER_RESBLOCK, make_engine, micro_batches

UPDATES, EVERY = 200, 100


class _Mallinfo(ctypes.Structure):
    """glibc's mallinfo2, which counts the used bytes of the heap and of separately mapped blocks."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def bytes_in_use() -> int:
    """Bytes that Python (with PYTHONMALLOC=malloc) and torch have allocated on the main thread."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo
    found = mallinfo2()
    return found.uordblks + found.hblkhd


def main(folder: Path) -> None:
    ranks = join()
    engine_cases.CONFIG = engine_cases.CONFIG.model_copy(update={"n_layers": 1})
    engine = make_engine(folder, ranks, PER_RESBLOCK, accumulation=2)
    recompute_layers(engine.module)
    average = EMA(engine.shards(), EMAConfig(decay=0.5))
    batch, held = micro_batches(0, ranks, 2), []
    for update in range(UPDATES):
        report = engine.update(batch, ADAMW.lr)
        average.update(engine.shards())
        if update % 10 == 0:
            with average.in_place_of(engine.shards(), engine.refresh_gathered_parameters):
                engine.evaluate(batch)
            engine.phases.take()
        assert report.took_step
        if (update + 1) % EVERY == 0:
            gc.collect()
            held.append([len(parameter_offload.FWD_MODULE_STACK), len(gc.get_objects()), bytes_in_use()])
    (folder / "held.json").write_text(json.dumps(held))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
