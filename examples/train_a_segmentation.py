"""python examples/train_a_segmentation.py: plain PyTorch on a pre-trained backbone, on synthetic anatomy."""

import torch
import torch.nn.functional as F

from gvsl_zoo import load
from gvsl_zoo.pretrain.anatomy import LABELS, sample_subject

torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
net = load("gvsl-unet-ct-nano", task="segmentation", num_classes=len(LABELS)).train()
optimizer = torch.optim.AdamW(net.parameter_groups(lr=3e-3, layer_decay=0.7))

for step in range(15):
    subject = sample_subject((32, 48, 48), generator, spacing_mm=(6.0, 6.0, 6.0))
    image = ((subject.hu + 1024) / 2048).clamp(0, 1)[None, None]
    logits = net(image)
    loss = F.cross_entropy(logits, subject.labels[None].long())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 7 == 0:
        right = (logits.argmax(1) == subject.labels).float().mean()
        print(f"step {step}: loss {loss.item():.3f}, voxels right {right:.2f}")
