"""Train a small CLIP on raw shards: what scores the candidates of a prior that was trained on the same pictures."""

import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_ds.console import progress
from dalle_ds.data.prefetch import Prefetch
from dalle_ds.ops.devices import on_device
from dalle_ds.optim.schedules import half_cosine, linear_warmup
from dalle_ds.pretrained.clip import Clip
from dalle_ds.recipes import dump_recipe, flatten
from dalle_ds.tracking.provenance import code_tags
from dalle_ds.tracking.tracker import NullTracker, Tracker
from dalle_ds.training.clip.config import ClipRun
from dalle_ds.training.clip.data import batches, crops, one_of_each_group, read_split
from dalle_ds.training.clip.tokenizer import train_clip_tokenizer
from dalle_ds.training.preemption import EXIT_STOPPED, RunLock, StopFlag
from dalle_ds.training.run_folder import (
    exact_device,
    finished_report,
    identity_of,
    load_checkpoint,
    require_room,
    save_checkpoint,
    shards_digest,
    write_report,
)

log = logging.getLogger(__name__)

MODEL_FOLDER, REPORT_FILE, PROVENANCE_FILE = "model", "clip_report.json", "provenance.json"
HELD_OUT = 512  # pictures at most, each with one right caption among them
MAX_LOGIT_SCALE = math.log(100)  # as CLIP's


def train_clip(run: ClipRun) -> dict[str, Any]:
    """Train, or go on with, the run in `run.folder`; a finished run is left alone. Returns the report.

    `run.folder`/model is what `Clip.load` and `transformers` open.

    Raises:
        UserError: anything about the recipe, the data or the folder that would stop the run later.
        SystemExit(143): asked to stop; the state is saved.
    """
    folder = Path(run.folder)
    with StopFlag() as stop, RunLock(folder):
        shards = shards_digest(run.data.raw)
        identity = identity_of("clip", run, shards)
        finished = finished_report(folder / REPORT_FILE, identity)
        if finished is not None:
            log.info("%s is finished: %d updates; nothing to do", folder / MODEL_FOLDER, finished["updates"])
            return finished
        with closing(_Trainer(run, identity, shards)) as trainer:
            return trainer.run(stop)


class _Trainer:
    """One run: what it is made of (built and checked in the constructor), and its loop."""

    def __init__(self, run: ClipRun, identity: str, shards: str) -> None:
        self.recipe, self.identity, self.shards, self.folder = run, identity, shards, Path(run.folder)
        self.tracker, self.status = NullTracker(), "FAILED"
        self.device = exact_device(run.device)
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        samples = read_split(run.data, "train", run.model.image_size)
        self.held_out = one_of_each_group(read_split(run.data, "validation", run.model.image_size))[:HELD_OUT]
        torch.manual_seed(run.seed)
        captions = [sample.caption for sample in samples]
        self.tokenizer = train_clip_tokenizer(captions, run.model.vocab_size, run.model.text_len)
        self.model = _new_model(run, self.tokenizer).to(self.device)
        self.processor = _new_processor(run.model.image_size)
        self._mean = torch.tensor(self.processor.image_mean, device=self.device)
        self._std = torch.tensor(self.processor.image_std, device=self.device)
        parameters = list(self.model.parameters())
        require_room(self.folder, sum(p.numel() for p in parameters))
        decayed = [p for p in parameters if p.ndim > 1]
        groups = [
            {"params": decayed, "weight_decay": run.optimizer.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=run.optimizer.lr, betas=(0.9, run.optimizer.beta2), fused=True)
        self.update, self.seconds = 0, 0.0
        self._restore()
        source = batches(samples, run.batch_size, run.model.image_size, run.seed, self.update)
        self.batches = Prefetch(source, 4, "clip-pictures")

    def run(self, stop: StopFlag) -> dict[str, Any]:
        run = self.recipe
        (self.folder / "recipe.yaml").write_text(dump_recipe(run), encoding="utf-8")
        self.tracker = Tracker.start(
            self.folder,
            uri=run.tracking.uri,
            experiment=run.tracking.experiment,
            run_name=run.tracking.run_name,
            tags={**code_tags(), "stage": "clip", "run_fingerprint": self.identity},
            params=flatten(run.model_dump(mode="json")),
        )
        self.tracker.input_dataset("raw", run.data.raw, self.shards)
        before, began, resumed_at = self.seconds, time.monotonic(), self.update
        with progress(total=run.updates, initial=self.update, what="CLIP", unit="update") as bar:
            while self.update < run.updates:
                metrics = self._step()
                self.update += 1
                self.seconds = before + time.monotonic() - began
                bar.update(1)
                if self.update % run.tracking.every == 0:
                    rate = (self.update - resumed_at) * run.batch_size / (time.monotonic() - began)
                    values = {f"train/{name}": float(value) for name, value in metrics.items()}
                    self.tracker.metrics({**values, "train/images_per_second": rate}, self.update)
                    bar.set_postfix_str(f"loss {values['train/loss']:.3f}", refresh=False)
                if self.update % run.report_every == 0 and self.update < run.updates:
                    self._validate()
                if self.update % run.checkpoint_every == 0 or self.update == run.updates or stop.requested:
                    self._save()
                if stop.requested and self.update < run.updates:
                    self.status = "KILLED"
                    log.info(
                        "asked to stop (%s): saved update %d in %s; the same command goes on from there",
                        stop.reason,
                        self.update,
                        self.folder,
                    )
                    raise SystemExit(EXIT_STOPPED)
        report = self._finish()
        self.status = "FINISHED"
        return report

    def close(self) -> None:
        """End the thread of the run, and tell MLflow how it ended."""
        self.batches.close()
        self.tracker.close(self.status)

    def _step(self) -> dict[str, Any]:
        run = self.recipe
        lr = half_cosine(self.update, run.optimizer.lr, 0.0, run.updates) * linear_warmup(self.update, run.optimizer.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = next(self.batches)
        tokens = self.tokenizer(batch.captions, padding="longest", truncation=True, return_tensors="pt")
        tokens = {name: on_device(values, self.device) for name, values in tokens.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            logits_BB = self.model(pixel_values=self._pixels(batch.images_BHWC), **tokens).logits_per_text.float()
        right_B = torch.arange(len(logits_BB), device=self.device)
        loss = (F.cross_entropy(logits_BB, right_B) + F.cross_entropy(logits_BB.T, right_B)) / 2
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), run.optimizer.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        scale = self.model.logit_scale.detach().exp()
        return {"loss": loss.detach(), "grad_norm": grad_norm, "learning_rate": lr, "logit_scale": scale}

    def _pixels(self, images_BHWC: np.ndarray) -> Tensor:
        """As the picture preprocessing that is saved with the model does it, for pictures of the right size."""
        pixels_BHWC = (on_device(torch.from_numpy(images_BHWC), self.device).float() / 255 - self._mean) / self._std
        return pixels_BHWC.permute(0, 3, 1, 2)

    # ---- measuring -------------------------------------------------------------------------------------------------------

    def _validate(self) -> dict[str, float]:
        clip = self._clip()
        numbers = retrieval(clip, crops(self.held_out, clip.image_size), [sample.caption for sample in self.held_out])
        self.model.train()
        self.tracker.metrics({f"validation/{name}": value for name, value in numbers.items()}, self.update)
        log.info(
            "update %d, retrieval among %d held out: top-1 %.3f, top-5 %.3f",
            self.update,
            len(self.held_out),
            numbers["top1"],
            numbers["top5"],
        )
        return numbers

    def _clip(self) -> Clip:
        return Clip(self.model.eval(), self.tokenizer, self.processor)

    def _finish(self) -> dict[str, Any]:
        """Measure, write the model, then the report, which says that the run is finished."""
        numbers = self._validate()
        target, aside = self.folder / MODEL_FOLDER, self.folder / f"{MODEL_FOLDER}.incoming"
        for part in (self.model, self.tokenizer, self.processor):
            part.save_pretrained(aside)
        report = {
            "clip": self._clip().fingerprint,
            "run": self.identity,
            "model": str(target),
            **numbers,
            "held_out": len(self.held_out),
            "updates": self.update,
            "seconds": round(self.seconds, 1),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
        origin = {**report, "raw": self.recipe.data.raw, "shards": self.shards, **code_tags()}
        (aside / PROVENANCE_FILE).write_text(json.dumps(origin, indent=1), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        write_report(self.folder / REPORT_FILE, report)
        self.tracker.tags({"clip": report["clip"]})
        for name in (MODEL_FOLDER, REPORT_FILE, "recipe.yaml"):
            self.tracker.artifact(self.folder / name)
        return report

    # ---- stopping and going on -------------------------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            "identity": self.identity,
            "update": self.update,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(self.folder, state)

    def _restore(self) -> None:
        state = load_checkpoint(self.folder, self.identity)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.update, self.seconds = state["update"], state["seconds"]
        log.info("going on from update %d", self.update)


def retrieval(clip: Clip, images_SHWC: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """How often a caption finds its picture among S, and a picture its caption (their mean): as the first, among the first 5.

    `chance` is what top-1 would be by luck.
    """
    logits_SS = clip.text_features(captions) @ clip.image_features(images_SHWC).T
    ranks = []
    for logits in (logits_SS, logits_SS.T):
        ranks.append((logits > logits.diagonal()[:, None]).sum(-1))  # how many are preferred to the right one
    ranks_2S = torch.stack(ranks).float()
    return {f"top{n}": (ranks_2S < n).float().mean().item() for n in (1, 5)} | {"chance": 1 / len(captions)}


def _new_model(run: ClipRun, tokenizer: Any) -> Any:
    from transformers import CLIPConfig, CLIPModel

    sizes = run.model
    tower = {"hidden_size": sizes.width, "intermediate_size": 4 * sizes.width, "num_attention_heads": sizes.heads}
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": sizes.text_len, "num_hidden_layers": sizes.text_layers}
    picture = {"image_size": sizes.image_size, "patch_size": sizes.patch_size, "num_hidden_layers": sizes.image_layers}
    config = CLIPConfig(
        text_config={**tower, **text, **marks}, vision_config={**tower, **picture}, projection_dim=sizes.n_features
    )
    return CLIPModel(config).train()


def _new_processor(image_size: int) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # the other wants torchvision

    return CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size})
