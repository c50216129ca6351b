"""Loading 23.5M parameters from a warm file, against building the module and torch.load: python -m benchmarks.load"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.timing import alternate, report
from gvsl_zoo import load, save_pretrained
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.registry import model_info

RESIDENT = """
import sys, pathlib, torch
from gvsl_zoo.zoo import load
from gvsl_zoo.models.unet import UNet
def pages():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
load(sys.argv[2], features_only=True)  # modules imported, file already trusted
before = pages()
{line}
print(pages() - before)
"""
LINES = {
    "build + torch.load + load_state_dict": (
        "m = UNet(3, 32); m.load_state_dict(torch.load(sys.argv[1], weights_only=True))"
    ),
    "load(file)": "m = load(sys.argv[2])",
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        model = UNet(3, 32)
        pth = Path(folder) / "unet.pth"
        torch.save(model.state_dict(), pth)
        file = save_pretrained(model, folder, entry=model_info("gvsl-unet-ct"))

        def released() -> None:
            built = UNet(3, 32)
            built.load_state_dict(torch.load(pth, weights_only=True))

        medians = alternate(
            {
                "build + torch.load + load_state_dict": released,
                "load(file)": lambda: load(file),
                "load(file, features_only=True), encoder only": lambda: load(file, features_only=True),
            },
            rounds=31,
            warmup=3,
        )
        resident = {}
        if Path("/proc/self/statm").exists():
            for name, line in LINES.items():
                command = [sys.executable, "-c", RESIDENT.format(line=line), str(pth), str(file)]
                resident[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    report(
        "load",
        medians,
        "build + torch.load + load_state_dict",
        parameters=sum(p.numel() for p in model.parameters()),
        extra_resident_MB={name: round(size / 1e6, 1) for name, size in resident.items()},
    )


if __name__ == "__main__":
    main()
