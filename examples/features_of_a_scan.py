"""python examples/features_of_a_scan.py: a scan in, features on its own grid out."""

import tempfile
from pathlib import Path

import torch

from gvsl_zoo import features, load, pooled_features, read_volume, write_volume
from gvsl_zoo.demo import as_volume
from gvsl_zoo.pretrain.anatomy import sample_subject

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "scan.nii.gz"  # a synthetic thorax; use your own CT here
    write_volume(as_volume(sample_subject((60, 70, 80), torch.Generator().manual_seed(0))), path)

    net = load("gvsl-unet-ct-nano")
    dense = features(path, net)
    write_volume(dense, Path(folder) / "features.nii.gz")
    print("scan", read_volume(path).shape, "-> features", dense.data.shape, "at", dense.spacing_mm, "mm")

    pooled = pooled_features(path, net)
    print("one vector a scan:", pooled.bottleneck.shape, "global,", pooled.local.shape, "local")
