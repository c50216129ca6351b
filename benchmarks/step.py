"""One whole pre-training step against a plain transcription of the released one: python -m benchmarks.step [--size 64]

The transcription is ours, from measurements of the released code: two whole scans read and normalised a step, cropped;
fixed, damaged and moving image each resampled twice; two passes of a U-Net in float32, contiguous; an affine matrix
rebuilt from numbers, so that nothing flows back through it; two warps; the NCC by five dense convolutions. Ours is the
step of `pretrain.loop`, with both images always damaged, from a prepared store.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.augment import released_damage, released_spatial
from benchmarks.ncc import dense_ncc_loss
from benchmarks.timing import RESULTS, add_device, alternate, report
from gvsl_zoo.memory import keep_freed_memory
from gvsl_zoo.models.gvsl import GVSL, released_affine_warp, released_warp
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.pretrain.config import PretrainConfig
from gvsl_zoo.pretrain.data import Pairs, open_data
from gvsl_zoo.pretrain.loop import build
from gvsl_zoo.pretrain.objective import Pretraining, make_batch
from gvsl_zoo.pretrain.prepare import prepare_store

SCAN_EDGE = 256  # voxels of 1 mm
KEPT = ", memory kept"  # as the command line runs: see gvsl_zoo/memory.py
CONTESTANTS = ("released", "ours, float32", "ours, bf16", "ours, float32" + KEPT, "ours, bf16" + KEPT)
TARGETS = {"ours, float32" + KEPT: 2.2, "ours, bf16" + KEPT: 4.0}  # times as fast as released
PEAK_TARGET = 0.85  # of the released peak, in bf16
GFLOP_96 = 3192  # of the convolutions of a released step at 96^3, forward and backward; in proportion to the voxels


class Clock:
    """Seconds of each part of each step, of which a GPU finishes each before the next begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def start(self) -> None:
        self.last = now()

    def lap(self, part: str) -> None:
        moment = now()
        self.seconds.setdefault(part, []).append(moment - self.last)
        self.last = moment

    def median(self) -> float:
        """Of the whole step."""
        return statistics.median(map(sum, zip(*self.seconds.values(), strict=True)))


def now() -> float:
    """Seconds, when all that was asked of a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


# --- The released step --------------------------------------------------------------------------------------------


class Double(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (before, after):
            layers += [nn.Conv3d(channels, after, 3, padding=1), nn.GroupNorm(after // 8, after), nn.LeakyReLU(0.2)]
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool3d(2), Double(before, after))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True)
        self.conv = Double(before, after)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, self.up(x)], 1))


class ReleasedUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inc = Double(1, 32)
        self.down1, self.down2, self.down3, self.down4 = Down(32, 64), Down(64, 128), Down(128, 256), Down(256, 512)
        self.up1, self.up2, self.up3, self.up4 = Up(768, 256), Up(384, 128), Up(192, 64), Up(96, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x5 = self.down4(x4)
        return x5, self.up4(self.up3(self.up2(self.up1(x5, x4), x3), x2), x1)


class Released(nn.Module):
    """The released module; the names of its tensors are those of `GVSL`."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = ReleasedUNet()
        self.f_conv = Double(1024, 256)
        self.fc_rot, self.fc_scl, self.fc_trans, self.fc_shear = (nn.Linear(256, n) for n in (3, 3, 3, 6))
        self.sp_conv = Double(64, 16)
        self.out_flow = nn.Conv3d(16, 3, 3, padding=1)
        self.res_conv = nn.Sequential(
            nn.Conv3d(32, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.LeakyReLU(0.2), nn.Conv3d(16, 1, 1)
        )

    def forward(self, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Warped moving image, flow, restored fixed image."""
        (global_a, local_a), (global_b, local_b) = self.unet(fixed), self.unet(moving)
        pooled = self.f_conv(torch.cat([global_b, global_a], 1)).mean((2, 3, 4))
        numbers = torch.cat([fc(pooled) for fc in (self.fc_rot, self.fc_scl, self.fc_trans, self.fc_shear)], 1)
        affine = rebuilt_matrix(*numbers[0].tolist()).to(numbers.device)
        flow = self.out_flow(self.sp_conv(torch.cat([released_affine_warp(local_b, affine), local_a], 1)))
        return released_warp(released_affine_warp(moving, affine), flow), flow, self.res_conv(local_a)


def rebuilt_matrix(*numbers: float) -> Tensor:
    """(1, 3, 4) = Shear @ Scale @ Rz @ Ry @ Rx | translation, of plain numbers: no gradient."""
    clamped = [min(max(n, -1), 1) for n in numbers]
    (sx, sy, sz), (cx, cy, cz) = ([f(math.pi / 9 * n) for n in clamped[:3]] for f in (math.sin, math.cos))
    xy, xz, yx, yz, zx, zy = (math.tan(math.pi / 18 * n) for n in clamped[9:])
    turn_x = torch.tensor([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    turn_y = torch.tensor([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    turn_z = torch.tensor([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    scale = torch.diag(torch.tensor([1 + 0.25 * n for n in clamped[3:6]]))
    shear = torch.tensor([[1, xy, xz], [yx, 1, yz], [zx, zy, 1]])
    linear = shear @ scale @ turn_z @ turn_y @ turn_x
    return torch.cat([linear, torch.tensor(numbers[6:9])[:, None]], 1)[None]


def read_scan(path: Path) -> np.ndarray:
    """A whole scan, normalised."""
    return (nib.load(path).get_fdata(dtype=np.float32) + 1024).clip(0, 2048) / 2048


def released_step(folder: Path, size: int, device: str) -> Callable[[Clock], None]:
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    paths = sorted((folder / "scans").iterdir())
    model = Released().to(device)
    model.load_state_dict(GVSL(UNet(generator=generator), generator=generator).state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def crop(image: np.ndarray) -> np.ndarray:
        corner = [random.integers(0, n - size + 1) for n in image.shape]
        return np.ascontiguousarray(image[tuple(slice(a, a + size) for a in corner)])

    def step(clock: Clock) -> None:
        fixed, moving = (crop(read_scan(path)) for path in paths)
        clock.lap("feed")
        images = [torch.from_numpy(x)[None, None] for x in (fixed, released_damage(fixed, random), moving)]
        fixed, damaged, moving = (image.to(device) for image in released_spatial(images, generator))
        clock.lap("augmentation")
        warped, flow, restored = model(damaged, moving)
        steps = [flow.diff(dim=axis).square().mean() for axis in (2, 3, 4)]
        loss = dense_ncc_loss(warped, fixed) + sum(steps) / 3 + F.mse_loss(restored, fixed)
        clock.lap("forward")
        optimizer.zero_grad()
        loss.backward()
        clock.lap("backward")
        optimizer.step()
        clock.lap("optimiser")

    return step


@torch.no_grad()
def transcription_error() -> float:
    """Largest relative difference of the transcription and the package's released convention, which meets goldens."""
    generator = torch.Generator().manual_seed(0)
    checked, ours = Released().eval(), GVSL(UNet(generator=generator), convention="released", generator=generator)
    checked.load_state_dict(ours.state_dict())
    fixed, moving = (torch.rand(1, 1, 32, 32, 32, generator=generator) for _ in range(2))
    whole = ours.eval()(fixed, moving)
    expected = (whole.warped, whole.displacement, whole.restored)
    pairs = zip(checked(fixed, moving), expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


# --- Our step -----------------------------------------------------------------------------------------------------


def own_step(folder: Path, size: int, bf16: bool, device: str) -> Callable[[Clock], None]:
    config = PretrainConfig(
        steps=1000,
        width=32,
        affine_width=None,
        crop=(size,) * 3,
        spacing_mm=1.0,
        synthetic_share=0.0,
        ramp_steps=0,
        damage_share=1.0,
        learning_rate=1e-4,
        bf16=bf16,
    )
    task = Pretraining(build(config, None), config).train()
    task.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(task.parameters(), lr=config.learning_rate, fused=True)
    pairs = Pairs(config, open_data(str(folder / "store"), config, None), pairs_a_step=1)
    numbers = itertools.count()

    def step(clock: Clock) -> None:
        number = next(numbers)
        pair = pairs[number]
        clock.lap("feed")
        batch = make_batch([pair], [number], config, torch.device(device))
        clock.lap("augmentation")
        terms = task(batch)
        clock.lap("forward")
        sum(terms.values(), torch.zeros((), device=device)).backward()
        clock.lap("backward")
        torch.nn.utils.clip_grad_norm_(task.parameters(), config.clip_norm).item()
        optimizer.step()
        optimizer.zero_grad()
        clock.lap("optimiser")

    return step


# --- Measuring ----------------------------------------------------------------------------------------------------


def make_step(name: str, folder: Path, size: int, device: str) -> Callable[[Clock], None]:
    if name == "released":
        return released_step(folder, size, device)
    return own_step(folder, size, "bf16" in name, device)


def take_turn(name: str, step: Callable[[Clock], None], clock: Clock) -> None:
    """One step on the clock; where memory is kept, after one that takes it."""
    if name.endswith(KEPT):
        keep_freed_memory()
        warm = Clock()
        warm.start()
        step(warm)
    clock.start()
    step(clock)
    keep_freed_memory(False)


def convolution_rates(dtype: torch.dtype, device: str) -> dict[str, float]:
    """GFLOP/s of this machine in 32 -> 32 and 128 -> 128 channels, forward and backward, channels last: its floor."""
    rates: dict[str, list[float]] = {"forward": [], "backward": []}
    for channels, size in ((32, 64), (128, 24)):
        x = torch.randn(2, channels, size, size, size, dtype=dtype, device=device)
        weight = torch.randn(channels, channels, 3, 3, 3, dtype=dtype, device=device)
        x, weight = (tensor.to(memory_format=torch.channels_last_3d) for tensor in (x, weight))
        passes = {
            "forward": (1, lambda x=x, weight=weight: F.conv3d(x, weight, padding=1)),
            "backward": (
                2,
                lambda x=x, weight=weight: torch.ops.aten.convolution_backward(
                    x, x, weight, None, [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1, [True, True, False]
                ),
            ),
        }
        seconds = alternate({name: run for name, (_, run) in passes.items()}, rounds=5)
        for name, (times, _) in passes.items():
            rates[name].append(times * 2 * 27 * x.numel() * channels / seconds[name] / 1e9)
    return {name: round(statistics.fmean(values)) for name, values in rates.items()}


def write_scans(folder: Path, suffix: str = ".nii", count: int = 2) -> None:
    """Synthetic subjects as NIfTI files of int16 in `folder`/scans."""
    (folder / "scans").mkdir()
    for seed in range(count):
        subject = sample_subject((SCAN_EDGE,) * 3, torch.Generator().manual_seed(seed), (1.0, 1.0, 1.0))
        voxels = subject.hu.round().to(torch.int16).numpy().T  # (x, y, z)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / "scans" / f"{seed}{suffix}")


def peak_MiB() -> float:
    """Of this process: unlike ru_maxrss, without what its parent held when it started it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def beyond_MiB(run: Callable[[], None]) -> int:
    """The most that the tensors of a run take of a GPU beyond those that were there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=0, help="steps that are not counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 where others use a core")
    add_device(parser)
    parser.add_argument("--no-peaks", action="store_true", help="keep those in the results file")
    parser.add_argument("--alone", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = "step" if options.size == 96 else f"step_{options.size}"
    on_cpu = options.device == "cpu"
    contestants = CONTESTANTS if on_cpu else tuple(name for name in CONTESTANTS if not name.endswith(KEPT))
    if options.alone:
        keep_freed_memory(options.alone.endswith(KEPT))
        step, clock = make_step(options.alone, options.data, options.size, "cpu"), Clock()
        for _ in range(2):  # the second with the moments of Adam
            clock.start()
            step(clock)
        print(peak_MiB())
        return

    load = os.getloadavg()[0]  # others' work: above 0, the machine is shared
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_scans(folder)
        prepare_store(folder / "scans", folder / "store")
        peaks = json.loads((RESULTS / f"{result}.json").read_text())["peak_MiB"] if options.no_peaks else {}
        for name in contestants if on_cpu and not options.no_peaks and Path("/proc/self/status").exists() else ():
            command = [sys.executable, "-m", "benchmarks.step", "--alone", name, "--data", temporary]
            command += ["--size", str(options.size), "--threads", str(options.threads)]
            peaks[name] = round(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        clocks = {name: Clock() for name in contestants}
        steps = {name: make_step(name, folder, options.size, options.device) for name in contestants}
        for _ in range(options.warmup):
            for name in contestants:
                take_turn(name, steps[name], Clock())
        if not on_cpu:
            peaks = {name: beyond_MiB(partial(take_turn, name, steps[name], Clock())) for name in contestants}
        for _ in range(options.rounds):
            for name in contestants:
                take_turn(name, steps[name], clocks[name])
    medians = {name: clock.median() for name, clock in clocks.items()}
    parts = {
        name: {part: round(1e3 * statistics.median(seconds), 1) for part, seconds in clock.seconds.items()}
        for name, clock in clocks.items()
    }
    facts = {
        "size": options.size,
        "batch": 1,
        "width": 32,
        "parts_milliseconds": parts,
        "peak_MiB": peaks,
        "peaks_of_an_earlier_run": options.no_peaks,
        "peak_of_released": {name: round(peak / peaks["released"], 3) for name, peak in peaks.items()},
        "targets": {"faster": TARGETS, "peak_of_released": {"ours, bf16": PEAK_TARGET}} if on_cpu else {},
        "convolution_GFLOP": round(GFLOP_96 * (options.size / 96) ** 3),
        "convolution_GFLOP_per_second": {
            "float32": convolution_rates(torch.float32, options.device),
            "bf16": convolution_rates(torch.bfloat16, options.device),
        },
        "transcription_error": transcription_error(),
        "load_average_before": round(load, 2),
    }
    report(result, medians, "released", device=options.device, **facts)
    print("\n  part           " + "".join(f"{name:>28}" for name in contestants) + "   ms")
    for part in parts["released"]:
        print(f"  {part:<15}" + "".join(f"{parts[name][part]:28.1f}" for name in contestants))


if __name__ == "__main__":
    main()
