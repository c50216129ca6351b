"""Pre-train the embedded model on scans and synthetic anatomy: python scripts/train_nano.py DATA --out runs/nano

DATA holds `index.csv` (columns file, modality, anatomy) and the CT files that it names; only the scans below are read.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from pathlib import Path

import torch

from gvsl_zoo.pretrain.config import PretrainConfig
from gvsl_zoo.pretrain.data import Scan, ScanPairs
from gvsl_zoo.pretrain.loop import pretrain
from gvsl_zoo.registry import model_info
from gvsl_zoo.volume import Preprocessing, prepare, read_volume
from gvsl_zoo.zoo import save_pretrained

# Left out on purpose, as test subjects: lungfcp_0001, acrin_flt_013, kits_00072.
SCANS = {
    "chest": [
        "ts_cardiac",
        "lidc0001",
        "lidc0314",
        "cmb_crc_01068",
        "lungdx_a0002",
        "rider_pilot_0117",
        "rider_pilot_0109",
    ],
    "abdomen": ["acrin_flt_001", "cptac_pda_00189", "tcga_lihc_a10x", "ts_abdomen", "ts_abdomen_slab"],
}


def training_scans(data: Path, config: PretrainConfig) -> list[Scan]:
    """The CT volumes that pre-training may see, on the run's grid."""
    recipe = Preprocessing(spacing_mm=(config.spacing_mm,) * 3)
    return [
        Scan(prepare(read_volume(data / "ct" / f"{name}.nii.gz"), recipe).image[0], region)
        for region, names in SCANS.items()
        for name in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/nano"))
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = PretrainConfig(steps=options.steps)
    print(dataclasses.asdict(config))
    pairs = ScanPairs(training_scans(options.data, config), config.crop)
    model = pretrain(config, options.out, pairs, device="cpu")
    entry = dataclasses.replace(model_info("gvsl-unet-ct-nano"), sources=(), evaluation=())
    path = save_pretrained(model, options.out, entry=entry, dtype=torch.float16)
    print(f"{path}: sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
