"""Train a small CLIP on raw shards, which reranks the samples of a prior trained on the same images."""

import json
import logging
import math
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_ds.data.raw.streams import Reading
from dalle_ds.lazy import large_imports
from dalle_ds.ops.devices import on_device
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.pretrained.clip import Clip
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.tracking.provenance import code_tags
from dalle_ds.training.clip.config import ClipRunConfig
from dalle_ds.training.clip.contrastive import contrastive_loss
from dalle_ds.training.clip.data import ClipBatches, reading_of, tokenizer_captions, validation_pairs
from dalle_ds.training.clip.tokenizer import Vocabulary, clip_tokenizer, learn_vocabulary
from dalle_ds.training.image_run import (
    ImageCheckpoints,
    ImageTrainer,
    RawData,
    all_cursors,
    cursors_of,
    device_of,
    finished_or_trained,
    finished_report,
    raw_data,
    sum_over_ranks,
)
from dalle_ds.training.run import Stopwatch, TrainingRun, open_run
from dalle_ds.training.skipped_updates import SkippedUpdates

log = logging.getLogger(__name__)

MODEL_FOLDER, REPORT_FILE, PROVENANCE_FILE = "model", "clip_report.json", "provenance.json"
RESULTS = (MODEL_FOLDER, REPORT_FILE)
MAX_LOGIT_SCALE = math.log(100)  # as in CLIP


def train_clip(recipe: ClipRunConfig, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Train or resume the run in `recipe.folder`. A finished run is not changed. Returns the report, on every rank.

    The model goes to `recipe.folder`/model, a folder that `Clip.load` and `transformers` open. Ranks hold the whole model and
    divide every batch; the loss is that of the whole batch. As for the dVAE, batches do not depend on the number of ranks, and
    `recipe.folder` must be on a file system that all ranks share.

    Raises:
        UserError: the recipe, the data or the folder has a problem that would stop the run later.
        RankLost: another rank died, failed or hangs.
        SystemExit(143): the run was asked to stop, and its state is saved.
    """
    with open_run(recipe.folder, ranks, recipe.failure.collective_timeout) as run:
        data = raw_data(recipe.data.raw, ranks)

        def train(identity: str) -> dict[str, Any]:
            with closing(ClipTrainer(run, recipe, identity, data)) as trainer:
                return trainer.train()

        return finished_or_trained(run, "clip", recipe, data, RESULTS, _finished, train)


class ClipTrainer(ImageTrainer):
    """The state of an unfinished run, resumed from its newest checkpoint if there is one."""

    stage, title = "clip", "CLIP"

    def __init__(self, run: TrainingRun, recipe: ClipRunConfig, identity: str, data: RawData) -> None:
        ranks = run.ranks
        self.run, self.ranks, self.folder = run, ranks, run.folder
        self.recipe, self.identity, self.shards = recipe, identity, data.digest
        self.device = device_of(recipe.device, ranks)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self.checkpoints = ImageCheckpoints(self.folder, identity, recipe.checkpoint.keep, ranks)
        saved = self.checkpoints.newest()
        self.update = 0 if saved is None else saved["update"]
        self.validation = validation_pairs(recipe, data.shards, run.folder, ranks)
        reading = reading_of(recipe, data.shards)
        cursors = None if saved is None or reading.is_whole else cursors_of(saved)
        self.batches = ClipBatches(recipe, reading, self.update, cursors, ranks)
        self.cursors = self.batches.cursors
        torch.manual_seed(recipe.seed)
        self.vocabulary = self._learn_vocabulary(reading) if saved is None else Vocabulary(*saved["vocabulary"])
        self.tokenizer = clip_tokenizer(self.vocabulary, recipe.model.text_len)
        self.model = _new_model(recipe, self.tokenizer).to(self.device)
        if recipe.precision == "bf16" and self.device.type == "cpu":
            self.model.set_attn_implementation("eager")  # the fused backward pass takes two thirds of an update there
        self.processor = _new_processor(recipe.model.image_size)
        self._mean = torch.tensor(self.processor.image_mean, device=self.device)
        self._std = torch.tensor(self.processor.image_std, device=self.device)
        self.parameters = parameters = list(self.model.parameters())
        self.checkpoints.check_disk_space(self._n_parameters())
        decayed = [p for p in parameters if p.ndim > 1]
        groups = [
            {"params": decayed, "weight_decay": recipe.optimizer.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=recipe.learning_rate.peak, betas=(0.9, recipe.optimizer.beta2), fused=True
        )
        self.skipped = SkippedUpdates(recipe.failure.updates_without_step)
        self.watch = Stopwatch(self._restore(saved))

    def _learn_vocabulary(self, reading: Reading) -> Vocabulary:
        """On the main rank. Same on every rank."""

        def learn() -> Vocabulary:
            samples = self.batches.samples
            captions = tokenizer_captions(self.recipe, reading) if samples is None else [sample.caption for sample in samples]
            return learn_vocabulary(captions, self.recipe.model.vocab_size)

        return self.ranks.once(learn)

    def close(self) -> None:
        """Stop the threads and processes that make batches."""
        self.batches.close()

    def _n_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def _describe(self) -> str:
        return describe(self.recipe, self._n_parameters(), self.ranks.world_size)

    def _step(self, stop_requested: bool) -> tuple[dict[str, Any], bool]:
        recipe = self.recipe
        lr = recipe.learning_rate.at(self.update, recipe.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = next(self.batches)
        self.cursors = batch.cursors
        tokens = self.tokenizer(batch.captions, padding="longest", truncation=True, return_tensors="pt")
        tokens = {name: on_device(values, self.device) for name, values in tokens.items()}
        images_bHWC, damaged = batch.images_bHWC, batch.damaged
        if damaged is not None:
            images_bHWC = np.concatenate([images_bHWC, damaged.images_bHWC])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            features = self.model(pixel_values=self._pixels(images_bHWC), **tokens)
        image_bD, copies_bD = features.image_embeds.tensor_split([len(batch.captions)])
        groups_b = on_device(torch.from_numpy(batch.groups_b), self.device)
        copies = None if damaged is None else (copies_bD, on_device(torch.from_numpy(damaged.differs_b), self.device))
        loss = contrastive_loss(features.text_embeds, image_bD, self.model.logit_scale, groups_b, copies, self.ranks)
        loss.backward()
        sums = sum_over_ranks(self.ranks, self.parameters, {"stop_requests": stop_requested})
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, recipe.optimizer.clip, foreach=True)
        if self.skipped.take_step(self.update, grad_norm, loss):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        scale = self.model.logit_scale.detach().exp()
        metrics = {
            "loss/train/total": loss.detach(),
            "optimizer/gradient_norm": grad_norm,
            "optimizer/learning_rate": lr,
            "optimizer/skipped_updates": self.skipped.total,
            "model/logit_scale": scale,
            "speed/data_wait_seconds": self.batches.wait_seconds,
        }
        return metrics, bool(sums["stop_requests"])

    def _pixels(self, images_bHWC: np.ndarray) -> Tensor:
        """Normalize images of the model's size, as the image processor saved with the model does. Returns (b, C, H, W) fp32."""
        pixels_bHWC = (on_device(torch.from_numpy(images_bHWC), self.device).float() / 255 - self._mean) / self._std
        return pixels_bHWC.permute(0, 3, 1, 2)

    # ---- measuring -------------------------------------------------------------------------------------------------------

    def _validate(self) -> dict[str, float]:
        """Validate on the main rank; the others wait for it at the next update."""
        if not self.ranks.is_main:
            return {}
        numbers = retrieval(self._clip(), self.validation.images_SHWC.numpy(), self.validation.captions)
        self.model.train()
        self.run.tracker.metrics({f"validation/{name}": value for name, value in numbers.items()}, self.update)
        log.info(
            "update %d, retrieval among %d validation images: top-1 %.3f, top-5 %.3f",
            self.update,
            len(self.validation.captions),
            numbers["top1"],
            numbers["top5"],
        )
        return numbers

    def _clip(self) -> Clip:
        return Clip(self.model.eval(), self.tokenizer, self.processor)

    def _finish(self) -> dict[str, Any]:
        """Validate and write the results. Returns the report."""
        numbers = self._validate()
        report = self.ranks.once(lambda: self._write_results(numbers))
        self.run.finished()
        return report

    def _write_results(self, numbers: dict[str, float]) -> dict[str, Any]:
        """Write the model, then the report. The report marks the run as finished. Returns it."""
        target, aside = self.folder / MODEL_FOLDER, self.folder / f"{MODEL_FOLDER}.incoming"
        for part in (self.model, self.tokenizer, self.processor):
            part.save_pretrained(aside)
        report = {
            "clip": self._clip().fingerprint,
            "run": self.identity,
            "model": str(target),
            **numbers,
            "validation_samples": len(self.validation.captions),
            "updates": self.update,
            "skipped_updates": self.skipped.total,
            "seconds": round(self.watch.seconds, 1),
            "n_parameters": self._n_parameters(),
        }
        origin = {**report, "raw": self.recipe.data.raw, "shards": self.shards, **code_tags()}
        (aside / PROVENANCE_FILE).write_text(json.dumps(origin, indent=1), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        self.run.write_results(REPORT_FILE, report)  # last, because it marks the run as finished
        self.run.tracker.tags({"fingerprint.clip": report["clip"]})
        for name in RESULTS:
            self.run.tracker.artifact(self.folder / name)
        return report

    # ---- stop and resume -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            "update": self.update,
            "skipped_updates": self.skipped.total,
            "seconds": self.watch.seconds,
            "cursors": all_cursors(self.cursors, self.ranks),
            "vocabulary": tuple(self.vocabulary),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        self.checkpoints.save(self.update, state)

    def _restore(self, state: dict[str, Any] | None) -> float:
        """Load the state of the newest checkpoint, if any. Returns the seconds that the run had taken by then."""
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.skipped.total = state["skipped_updates"]
            log.info("resuming at update %d", self.update)
        self._require_same_start()
        return 0.0 if state is None else state["seconds"]


def _finished(folder: Path, identity: str) -> dict[str, Any] | None:
    """Return the report of a finished run in this folder. None if the report or the model is missing.

    Raises:
        FingerprintMismatch: the model is not the one of the report.
    """
    report = finished_report(folder / REPORT_FILE, identity)
    if report is None or not (folder / MODEL_FOLDER).exists():
        return None  # the last checkpoint is complete, so the trainer writes the model again from it
    found = Clip.load(folder / MODEL_FOLDER).fingerprint
    require_same(f"model {folder / MODEL_FOLDER}", report.get("clip", "none"), found)
    return report


def describe(run: ClipRunConfig, n_parameters: int, world_size: int = 1) -> str:
    """Describe the run and its main metrics in Markdown, for the run's MLflow page."""
    lines = [
        f"CLIP of {run.model.image_size} px with {n_parameters / 1e6:.1f} million parameters, which scores samples: "
        f"{run.updates} updates of {run.global_batch} image-caption pairs from `{run.data.raw}` on {world_size} ranks.",
        "",
        "Where to look first, under *Model metrics*:",
        "- `validation/top1` and `validation/top5`: fraction of the validation images and captions that find their partner; "
        "`validation/chance` is the top-1 of random choice. If they fall while `loss/train/total` falls, the model overfits.",
        "- `model/logit_scale`: it rises as the model becomes certain, to at most 100.",
        "- `speed/images_per_second` and `speed/data_wait_seconds`: if the second keeps growing, training waits for images.",
        "",
        "The settings are listed as parameters, and in `recipe.yaml` under *Artifacts*.",
    ]
    return "\n".join(lines)


def retrieval(clip: Clip, images_SHWC: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """Retrieval accuracy (top-1 and top-5) among S image-caption pairs, averaged over text-to-image and image-to-text.

    `chance` is the top-1 accuracy of random retrieval.
    """
    logits_SS = clip.text_features(captions) @ clip.image_features(images_SHWC).T
    ranks = []
    for logits in (logits_SS, logits_SS.T):
        ranks.append((logits > logits.diagonal()[:, None]).sum(-1))  # how many score above the match
    ranks_2S = torch.stack(ranks).float()
    return {f"top{n}": (ranks_2S < n).float().mean().item() for n in (1, 5)} | {"chance": 1 / len(captions)}


def _new_model(run: ClipRunConfig, tokenizer: Any) -> Any:
    with large_imports():
        from transformers import CLIPConfig, CLIPModel

    sizes = run.model
    tower = {"hidden_size": sizes.width, "intermediate_size": 4 * sizes.width, "num_attention_heads": sizes.n_heads}
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": sizes.text_len, "num_hidden_layers": sizes.n_text_layers}
    image = {"image_size": sizes.image_size, "patch_size": sizes.patch_size, "num_hidden_layers": sizes.n_image_layers}
    config = CLIPConfig(
        text_config={**tower, **text, **marks}, vision_config={**tower, **image}, projection_dim=sizes.n_features
    )
    return CLIPModel(config).train()


def _new_processor(image_size: int) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # the other one needs torchvision

    return CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size})
