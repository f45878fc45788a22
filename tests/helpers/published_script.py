"""A training script as users of the published implementation have it, written from the method's description alone:
images, conditions, loop, schedule, evaluation, metrics and checkpoints. Of this library it uses nothing; the flows are
given to it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.measure import label
from sklearn.metrics import auc, roc_auc_score
from torch import Tensor, nn

Flows = tuple[list[nn.Module], nn.Module]


@dataclass(frozen=True)
class Settings:
    """The recipe; its defaults are the published ones, but for sizes."""

    size: tuple[int, int]
    conditions: Sequence[int]
    lr: float = 1e-4
    batch_size: int = 8
    meta_epochs: int = 25
    sub_epochs: int = 4
    warm_up: int = 12
    milestones: Sequence[int] = (70, 90)
    clip: float = 2.0
    seed: int = 9826
    top_k: float = 0.03


@dataclass
class Record:
    """Keeps what the script prints, and more."""

    nll: list[float] = field(default_factory=list)
    """Mean of each sub-epoch."""
    printed: list[float] = field(default_factory=list)
    """The loss that it prints of each: the sum of the batches' means divided by the number of images."""
    rates: list[float] = field(default_factory=list)
    metrics: list[tuple[float, float, float | None]] = field(default_factory=list)
    """Det. (image AUROC), Loc. (pixel AUROC of the additive maps), PRO (of the multiplicative ones), of each meta
    epoch."""
    score: np.ndarray | None = None
    maps: tuple[np.ndarray, np.ndarray] | None = None
    """Additive, multiplicative: of the last meta epoch."""


def images_of(folder: Path, size: tuple[int, int]) -> Tensor:
    """Every PNG below ``folder``, in the order of names: (N, 3, H, W), normalised."""
    pixels = []
    for file in sorted(folder.rglob("*.png")):
        image = Image.open(file).convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS)
        pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.stack(pixels) - mean[:, None, None]) / std[:, None, None]


def masks_of(folder: Path, size: tuple[int, int]) -> np.ndarray:
    """A mask for every test image of a class in the MVTec AD layout, all good where there is none: (N, H, W) bool."""
    masks = []
    for file in sorted((folder / "test").rglob("*.png")):
        path = folder / "ground_truth" / file.parent.name / f"{file.stem}_mask.png"
        if file.parent.name == "good":
            masks.append(np.zeros(size, bool))
        else:
            mask = Image.open(path).convert("L").resize(size[::-1], Image.Resampling.NEAREST)
            masks.append(np.array(mask) / 255 > 0.5)
    return np.stack(masks)


def sinusoids(channels: int, height: int, width: int) -> Tensor:
    """The position code (D, H, W): sines and cosines of x in the first half of the channels, of y in the other."""
    code = torch.empty(channels, height, width)
    half = channels // 2
    for k in range(half // 2):
        frequency = math.exp(-2 * k * math.log(1e4) / half)
        x, y = (torch.arange(n) * frequency for n in (width, height))
        code[2 * k], code[2 * k + 1] = x.sin()[None, :], x.cos()[None, :]
        code[half + 2 * k], code[half + 2 * k + 1] = y.sin()[:, None], y.cos()[:, None]
    return code


class Script:
    """``extractor``: (B, 3, H, W) -> a feature map per level, at strides 4, 8 and 16."""

    def __init__(self, flows: Flows, extractor: Callable[[Tensor], Sequence[Tensor]], data: Path, c: Settings) -> None:
        self.parallel, self.fusion = flows
        self.c = c
        self.record = Record()
        self.optimizer = torch.optim.Adam(self.parameters(), lr=c.lr)
        self.epoch = 0
        with torch.no_grad():
            self.train = self._features(extractor, images_of(data / "train", c.size))
            self.test = self._features(extractor, images_of(data / "test", c.size))
        self.masks = masks_of(data, c.size)

    def parameters(self) -> list[nn.Parameter]:
        return [p for flow in (*self.parallel, self.fusion) for p in flow.parameters()]

    def _features(self, extractor: Callable[[Tensor], Sequence[Tensor]], images: Tensor) -> list[Tensor]:
        return [F.avg_pool2d(level, 3, 2, 1) for level in extractor(images)]

    def _forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        z, log_det = [], torch.zeros(len(levels[0]))
        for flow, level, channels in zip(self.parallel, levels, self.c.conditions, strict=True):
            condition = sinusoids(channels, *level.shape[2:]).repeat(len(level), 1, 1, 1)
            out, of_level = flow(level, [condition])
            z.append(out)
            log_det = log_det + of_level
        z, of_fusion = self.fusion(z)
        return z, log_det + of_fusion

    def run(self) -> Record:
        """Trains, and evaluates after each meta epoch."""
        torch.manual_seed(self.c.seed)
        for sub_epoch in range(self.c.meta_epochs * self.c.sub_epochs):
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate(sub_epoch)
            self.record.rates.append(self._rate(sub_epoch))
            self._sub_epoch()
            if (sub_epoch + 1) % self.c.sub_epochs == 0:
                self.epoch += 1
                self.record.metrics.append(self.evaluate())
        return self.record

    def _rate(self, sub_epoch: int) -> float:
        if sub_epoch < self.c.warm_up:
            return self.c.lr * (0.1 + 0.9 * sub_epoch / self.c.warm_up)
        return self.c.lr * 0.33 ** sum(sub_epoch >= milestone for milestone in self.c.milestones)

    def _sub_epoch(self) -> None:
        losses, count = [], len(self.train[0])
        for numbers in torch.randperm(count).split(self.c.batch_size):
            z, log_det = self._forward([level[numbers] for level in self.train])
            loss = (0.5 * sum(level.square().sum(dim=(1, 2, 3)) for level in z) - log_det).mean()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), self.c.clip)
            self.optimizer.step()
            losses.append((loss.item(), len(numbers)))
        self.record.nll.append(sum(loss * images for loss, images in losses) / count)
        self.record.printed.append(sum(loss for loss, _ in losses) / count)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float, float | None]:
        z, _ = self._forward(self.test)
        logp = [-0.5 * level.square().mean(dim=1) for level in z]
        total = sum(self._upsampled(level) for level in logp)
        likelihood = (total - total.amax(dim=(1, 2), keepdim=True)).exp()
        multiplicative = likelihood.amax(dim=(1, 2), keepdim=True) - likelihood
        pixels = int(self.c.size[0] * self.c.size[1] * self.c.top_k)
        score = multiplicative.flatten(1).topk(pixels, dim=1).values.mean(dim=1)
        added = sum(self._upsampled((level - level.amax(dim=(1, 2), keepdim=True)).exp()) for level in logp)
        additive = added.amax(dim=(1, 2), keepdim=True) - added
        self.record.score, self.record.maps = score.numpy(), (additive.numpy(), multiplicative.numpy())
        return (
            float(roc_auc_score(self.masks.any(axis=(1, 2)), score.numpy())),
            float(roc_auc_score(self.masks.ravel(), additive.numpy().ravel())),
            per_region_overlap(self.masks, multiplicative.numpy()),
        )

    def _upsampled(self, level: Tensor) -> Tensor:
        return F.interpolate(level[:, None], size=self.c.size, mode="bilinear", align_corners=True)[:, 0]

    def save(self, path: Path) -> Path:
        content = {
            "epoch": self.epoch,
            "fusion_flow": self.fusion.state_dict(),
            "parallel_flows": [flow.state_dict() for flow in self.parallel],
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(content, path)
        return path

    def load(self, path: Path) -> None:
        """Everything of ``path`` that fits, as the published loader takes it."""
        content = torch.load(path, weights_only=True)
        for flow, state in zip(self.parallel, content["parallel_flows"], strict=True):
            flow.load_state_dict(state, strict=False)
        self.fusion.load_state_dict(content["fusion_flow"], strict=False)
        self.optimizer.load_state_dict(content["optimizer"])
        self.epoch = content["epoch"]


def per_region_overlap(masks: np.ndarray, maps: np.ndarray, steps: int = 800, limit: float = 0.3) -> float | None:
    """PRO of the published evaluation; None where that fails."""
    regions = [(n, numbered == r) for n, numbered in enumerate(map(label, masks)) for r in range(1, numbered.max() + 1)]
    low, high = maps.min(), maps.max()
    points = []
    for threshold in (t for t in np.arange(low, high, (high - low) / steps) if t < high):
        above = maps > threshold
        points.append((above[~masks].mean(), np.mean([above[n][region].mean() for n, region in regions])))
    rates, overlaps = np.array([point for point in points if point[0] < limit]).reshape(-1, 2).T
    if len(rates) < 2:
        return None
    return float(auc((rates - rates.min()) / (rates.max() - rates.min()), overlaps))
