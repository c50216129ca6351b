"""The pre-training loop: draw pairs, pose them, damage the fixed image, match and restore, step."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..losses import local_ncc_loss, restoration_loss, smoothness_loss
from ..models.gvsl import GVSL
from ..models.unet import UNet
from ..spatial import compose, jacobian_determinant, warp
from ..weights import write_whole
from .augment import apply_pose, damage, sample_pose
from .config import PretrainConfig
from .data import Scan, ScanPairs, SyntheticPairs

EASIEST_VARIATION = 0.2  # of synthetic subjects at the first step: displacements within the window of the NCC
VALIDATION_PAIRS = 8
VALIDATION_SEED = 2**31  # synthetic subjects of validation are drawn apart from those of training


def pretrain(config: PretrainConfig, out: Path, scans: Sequence[Scan] = (), device: str = "cpu") -> GVSL:
    """Train GVSL on synthetic anatomy and, if given, on scans; return the module.

    `out` receives `log.jsonl` and `checkpoint.pt`; a run that finds its checkpoint there goes on from it.
    """
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(config.seed)
    unet = UNet(3, config.width, generator=generator)
    model = GVSL(unet, affine_width=config.affine_width, generator=generator)
    model = model.to(device, memory_format=torch.channels_last_3d).train()  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    step = resume(out / "checkpoint.pt", config, model, optimizer, generator)

    truncate_log(out / "log.jsonl", step)
    synthetic = SyntheticPairs(config.crop, config.spacing_mm)
    real = ScanPairs(scans, config.crop) if scans else None
    with (out / "log.jsonl").open("a") as log:
        while step < config.steps:
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            fixed, damaged, moving = draw_batch(config, step, synthetic, real, generator, device)
            terms = losses(model, fixed, damaged, moving, config.bf16)
            loss = sum(terms.values(), torch.zeros((), device=device))
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                raise ArgumentError(
                    f"loss became {loss.item()} and its gradient {norm.item()} at step {step}",
                    f"a checkpoint in {out} is from before and good; lower the learning rate",
                )
            optimizer.step()
            step += 1

            record = {"step": step, "loss": loss.item()} | {k: v.item() for k, v in terms.items()}
            record["seconds"] = time.perf_counter() - started
            saving = step % config.save_every == 0 or step == config.steps
            if saving:
                record |= validate(model, synthetic)
            log.write(json.dumps(record) + "\n")
            log.flush()
            if saving:
                save(out / "checkpoint.pt", config, model, optimizer, generator, step)
    return model.eval()


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / config.warmup_steps)
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def draw_batch(
    config: PretrainConfig,
    step: int,
    synthetic: SyntheticPairs,
    real: ScanPairs | None,
    generator: torch.Generator,
    device: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed, damaged and moving images, each (B, 1, D, H, W) in [0, 1]; one pose for all three of a pair."""
    difficulty = min(1.0, step / config.ramp_steps) if config.ramp_steps else 1.0
    pairs: list[tuple[Tensor, Tensor]] = []
    for _ in range(config.batch_size):
        if real is not None and float(torch.rand(1, generator=generator)) < (1 - config.synthetic_share) * difficulty:
            pairs.append(real.draw(generator))
        else:
            pairs.append(synthetic.draw(generator, EASIEST_VARIATION + (1 - EASIEST_VARIATION) * difficulty))
    fixed, moving = (torch.stack(images).to(device) for images in zip(*pairs, strict=True))
    pose = sample_pose(config.crop, generator, config.batch_size)
    fixed, moving = apply_pose(fixed, pose), apply_pose(moving, pose)
    damaging = float(torch.rand(1, generator=generator)) < config.damage_share
    return fixed, damage(fixed, generator) if damaging else fixed, moving


def losses(model: GVSL, fixed: Tensor, damaged: Tensor, moving: Tensor, bf16: bool) -> dict[str, Tensor]:
    """The three terms of GVSL (He et al. 2023, sec. 3.1), each with weight 1."""
    with torch.autocast(fixed.device.type, torch.bfloat16, enabled=bf16):
        f_fixed, f_moving = model.features(damaged, moving)
        affine, flow = model.match(f_fixed, f_moving)
        restored = model.restore(f_fixed.local)
    return {
        "ncc": local_ncc_loss(warp(moving, compose(affine, flow)), fixed),
        "smoothness": smoothness_loss(flow),
        "restoration": restoration_loss(restored, fixed),
    }


@torch.no_grad()
def validate(model: GVSL, synthetic: SyntheticPairs) -> dict[str, float]:
    """What matching does to held-out synthetic pairs, means over them; `folded` is a share of voxels."""
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    model.eval()
    sums: dict[str, float] = {}
    outputs = []
    for _ in range(VALIDATION_PAIRS):
        fixed, moving = (x[None] for x in synthetic.draw(generator))
        device = next(model.parameters()).device
        fixed, moving = fixed.to(device), moving.to(device)
        match = model(fixed, moving)
        numbers = {
            "ncc_before": 1 - local_ncc_loss(moving, fixed).item(),
            "ncc_after": 1 - local_ncc_loss(match.warped, fixed).item(),
            "folded": (jacobian_determinant(match.displacement) <= 0).float().mean().item(),
            "mean_displacement": match.displacement.norm(dim=1).mean().item(),
        }
        sums = {k: sums.get(k, 0.0) + v / VALIDATION_PAIRS for k, v in numbers.items()}
        outputs.append(match.affine.flatten())
    sums["affine_sd"] = torch.stack(outputs).std(0).mean().item()
    model.train()
    return sums


def save(
    path: Path,
    config: PretrainConfig,
    model: GVSL,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    step: int,
) -> None:
    """Write a checkpoint, whole or not at all: a kill leaves the one before."""
    state = {
        "config": asdict(config),
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
    }
    content = io.BytesIO()
    torch.save(state, content)
    write_whole(path, content.getvalue())


def resume(
    path: Path,
    config: PretrainConfig,
    model: GVSL,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    """Restore everything from a checkpoint, if there is one; return its step, else 0."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    given = asdict(config)
    changed = {k: (state["config"].get(k), given[k]) for k in given if state["config"].get(k) != given[k]}
    if changed:
        raise ArgumentError(
            f"{path} was made with other settings: " + ", ".join(f"{k} {a} -> {b}" for k, (a, b) in changed.items()),
            "use the same settings, or another folder",
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    return int(state["step"])


def truncate_log(path: Path, step: int) -> None:
    """Forget what was logged after the checkpoint of `step`: those steps run again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_whole(path, "".join(line for line in lines if json.loads(line)["step"] <= step).encode())
