"""Train a small CLIP on raw shards, which reranks the samples of a prior trained on the same images."""

import json
import logging
import math
import shutil
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_ds.data.prefetch import Prefetch
from dalle_ds.ops.devices import on_device, resolve_device
from dalle_ds.pretrained.clip import Clip
from dalle_ds.tracking.provenance import code_tags
from dalle_ds.training.clip.config import ClipRunConfig
from dalle_ds.training.clip.data import batches, crops, one_of_each_group, read_split
from dalle_ds.training.clip.tokenizer import train_clip_tokenizer
from dalle_ds.training.image_run import ImageCheckpoints, ImageTrainer, finished_report, identity_of, shards_digest
from dalle_ds.training.run import Stopwatch, TrainingRun, open_run

log = logging.getLogger(__name__)

MODEL_FOLDER, REPORT_FILE, PROVENANCE_FILE = "model", "clip_report.json", "provenance.json"
MAX_LOGIT_SCALE = math.log(100)  # as in CLIP


def train_clip(recipe: ClipRunConfig) -> dict[str, Any]:
    """Train or resume the run in `recipe.folder`. A finished run is not changed. Returns the report.

    The model goes to `recipe.folder`/model, a folder that `Clip.load` and `transformers` open.

    Raises:
        UserError: the recipe, the data or the folder has a problem that would stop the run later.
        SystemExit(143): the run was asked to stop, and its state is saved.
    """
    with open_run(recipe.folder) as run:
        shards = shards_digest(recipe.data.raw)
        identity = identity_of("clip", recipe, shards)
        finished = finished_report(run.folder / REPORT_FILE, identity)
        if finished is not None:
            log.info("%s is finished: %d updates; nothing to do", run.folder / MODEL_FOLDER, finished["updates"])
            return finished
        with closing(ClipTrainer(run, recipe, identity, shards)) as trainer:
            return trainer.train()


class ClipTrainer(ImageTrainer):
    """The state of an unfinished run, resumed from its newest checkpoint if there is one."""

    stage, title = "clip", "CLIP"

    def __init__(self, run: TrainingRun, recipe: ClipRunConfig, identity: str, shards: str) -> None:
        self.run, self.recipe, self.identity, self.shards, self.folder = run, recipe, identity, shards, run.folder
        self.device = resolve_device(recipe.device)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        samples = read_split(recipe.data, "train", recipe.model.image_size)
        validation = one_of_each_group(read_split(recipe.data, "validation", recipe.model.image_size))
        self.validation = validation[: recipe.validation.samples]  # each image matches exactly one caption
        torch.manual_seed(recipe.seed)
        captions = [sample.caption for sample in samples]
        self.tokenizer = train_clip_tokenizer(captions, recipe.model.vocab_size, recipe.model.text_len)
        self.model = _new_model(recipe, self.tokenizer).to(self.device)
        self.processor = _new_processor(recipe.model.image_size)
        self._mean = torch.tensor(self.processor.image_mean, device=self.device)
        self._std = torch.tensor(self.processor.image_std, device=self.device)
        parameters = list(self.model.parameters())
        self.checkpoints = ImageCheckpoints(self.folder, identity, recipe.checkpoint.keep, run.ranks)
        saved = self.checkpoints.newest()
        self.checkpoints.check_disk_space(self._n_parameters())
        decayed = [p for p in parameters if p.ndim > 1]
        groups = [
            {"params": decayed, "weight_decay": recipe.optimizer.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=recipe.learning_rate.peak, betas=(0.9, recipe.optimizer.beta2), fused=True
        )
        self.update = 0
        self.watch = Stopwatch(self._restore(saved))
        source = batches(samples, recipe.global_batch, recipe.model.image_size, recipe.seed, self.update)
        self.batches = Prefetch(source, 4, "clip-images")

    def close(self) -> None:
        """Stop the prefetch thread."""
        self.batches.close()

    def _n_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def _describe(self) -> str:
        return describe(self.recipe, self._n_parameters())

    def _step(self, stop_requested: bool) -> tuple[dict[str, Any], bool]:
        recipe = self.recipe
        lr = recipe.learning_rate.at(self.update, recipe.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = next(self.batches)
        tokens = self.tokenizer(batch.captions, padding="longest", truncation=True, return_tensors="pt")
        tokens = {name: on_device(values, self.device) for name, values in tokens.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            logits_BB = self.model(pixel_values=self._pixels(batch.images_BHWC), **tokens).logits_per_text.float()
        right_B = torch.arange(len(logits_BB), device=self.device)
        loss = (F.cross_entropy(logits_BB, right_B) + F.cross_entropy(logits_BB.T, right_B)) / 2
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.optimizer.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        scale = self.model.logit_scale.detach().exp()
        metrics = {
            "loss/train/total": loss.detach(),
            "optimizer/gradient_norm": grad_norm,
            "optimizer/learning_rate": lr,
            "model/logit_scale": scale,
        }
        return metrics, stop_requested

    def _pixels(self, images_BHWC: np.ndarray) -> Tensor:
        """Normalize images of the model's size, as the image processor saved with the model does. Returns (B, C, H, W) fp32."""
        pixels_BHWC = (on_device(torch.from_numpy(images_BHWC), self.device).float() / 255 - self._mean) / self._std
        return pixels_BHWC.permute(0, 3, 1, 2)

    # ---- measuring -------------------------------------------------------------------------------------------------------

    def _validate(self) -> dict[str, float]:
        clip = self._clip()
        numbers = retrieval(clip, crops(self.validation, clip.image_size), [sample.caption for sample in self.validation])
        self.model.train()
        self.run.tracker.metrics({f"validation/{name}": value for name, value in numbers.items()}, self.update)
        log.info(
            "update %d, retrieval among %d validation images: top-1 %.3f, top-5 %.3f",
            self.update,
            len(self.validation),
            numbers["top1"],
            numbers["top5"],
        )
        return numbers

    def _clip(self) -> Clip:
        return Clip(self.model.eval(), self.tokenizer, self.processor)

    def _finish(self) -> dict[str, Any]:
        """Validate, write the model, then the report. The report marks the run as finished. Returns it."""
        numbers = self._validate()
        target, aside = self.folder / MODEL_FOLDER, self.folder / f"{MODEL_FOLDER}.incoming"
        for part in (self.model, self.tokenizer, self.processor):
            part.save_pretrained(aside)
        report = {
            "clip": self._clip().fingerprint,
            "run": self.identity,
            "model": str(target),
            **numbers,
            "validation_samples": len(self.validation),
            "updates": self.update,
            "seconds": round(self.watch.seconds, 1),
            "n_parameters": self._n_parameters(),
        }
        origin = {**report, "raw": self.recipe.data.raw, "shards": self.shards, **code_tags()}
        (aside / PROVENANCE_FILE).write_text(json.dumps(origin, indent=1), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        self.run.write(REPORT_FILE, json.dumps(report, indent=1))  # last, because it marks the run as finished
        self.run.tracker.tags({"fingerprint.clip": report["clip"]})
        for name in (MODEL_FOLDER, REPORT_FILE):
            self.run.tracker.artifact(self.folder / name)
        self.run.finished()
        return report

    # ---- stop and resume -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            "update": self.update,
            "seconds": self.watch.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        self.checkpoints.save(self.update, state)

    def _restore(self, state: dict[str, Any] | None) -> float:
        """Load the state of the newest checkpoint, if any. Returns the seconds that the run had taken by then."""
        if state is None:
            return 0.0
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.update = state["update"]
        log.info("resuming at update %d", self.update)
        return state["seconds"]


def describe(run: ClipRunConfig, n_parameters: int) -> str:
    """Describe the run and its main metrics in Markdown, for the run's MLflow page."""
    lines = [
        f"CLIP of {run.model.image_size} px with {n_parameters / 1e6:.1f} million parameters, which scores samples: "
        f"{run.updates} updates of {run.global_batch} image-caption pairs from `{run.data.raw}`.",
        "",
        "Where to look first, under *Model metrics*:",
        "- `validation/top1` and `validation/top5`: fraction of the validation images and captions that find their partner; "
        "`validation/chance` is the top-1 of random choice. If they fall while `loss/train/total` falls, the model overfits.",
        "- `model/logit_scale`: it rises as the model becomes certain, to at most 100.",
        "- `speed/images_per_second`.",
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
