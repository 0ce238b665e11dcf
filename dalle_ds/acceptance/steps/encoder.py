"""The encode stage: images per second of the dVAE's encoder in each precision, and of the stage that feeds it."""

from dalle_ds.acceptance.place import Place
from dalle_ds.acceptance.record import Record
from dalle_ds.bench.harness.settings import EncodeBenchConfig
from preprocessing import bench

TARGET = 0.95
"""Target fraction of the bare encoder's rate, from dalle_ds/bench/README.md for full-size images."""


def run(record: Record, is_rehearsal: bool) -> None:
    place = Place(is_rehearsal)
    for precision in place.pick(("fp32", "fp16"), ("fp32",)):
        size = place.pick({"images": 256, "batch": 32}, {"images": 4, "batch": 2, "small": True})
        settings = EncodeBenchConfig.model_validate({**size, "rounds": 1, "precision": precision, "device": place.device.type})
        seen = bench.run(settings).summary()
        record.tell(f"{precision}: images per second of the encoder", seen["images_per_second_bare"])
        why = "the encoder waits for decoding and resizing: use more cores per GPU, or smaller input images"
        hoped = place.pick(seen["images_per_second_bare"], None)
        record.rate(f"{precision}: images per second of the stage", seen["images_per_second_ours"], hoped, TARGET, why)
        record.tell(f"{precision}: images per second that a core decodes", seen["images_per_second_core_decode_resize"])
        record.detail(precision, seen)
