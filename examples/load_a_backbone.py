"""python examples/load_a_backbone.py: dense features, feature maps for a decoder, and learning rates by depth."""

import torch

from gvsl_zoo import load

scan = torch.rand(1, 1, 37, 50, 61)  # (B, C, D, H, W) in [0, 1], any size

net = load("gvsl-unet-ct-nano")
print(net.load_report)
print("dense local features", tuple(net(scan).shape))
bottleneck, local = net.forward_features(scan)
print("bottleneck", tuple(bottleneck.shape))

encoder = load("gvsl-unet-ct-nano", features_only=True)  # the decoder is not even read
for level, features in zip(encoder.feature_info, encoder(scan), strict=True):
    print(level.module, level.channels, "channels, reduction", level.reduction, tuple(features.shape))

groups = net.parameter_groups(lr=1e-3, layer_decay=0.8)
optimizer = torch.optim.AdamW(groups)
print("learning rates", {g["name"]: round(g["lr"], 5) for g in optimizer.param_groups})
