"""Only SIGReg, in a LeJEPA loop of one's own: views of an image agree, and SIGReg keeps their embeddings Gaussian.

python examples/sigreg_in_lejepa.py
torchrun --nproc-per-node 2 examples/sigreg_in_lejepa.py    # DDP: the samples of all ranks count together
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastle import SIGReg, crop_resize

LAMBDA = 0.05  # weight of SIGReg
VIEWS, SIDE = 4, 20  # crops of each image, and their side in pixels


def make_encoder(features: int = 64) -> nn.Module:
    """Any encoder of images (B, 3, 32, 32) to embeddings (B, features)."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, stride=4), nn.GELU(), nn.Conv2d(32, 64, 2, stride=2), nn.GELU(), nn.Flatten(),
        nn.Linear(64 * 4 * 4, features),
    )  # fmt: skip


def draw_views(images: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Random crops, resized to the whole size. Yours may be those of torchvision."""
    corners = (VIEWS, 2, len(images))
    draws = torch.randint(images.shape[-1] - SIDE + 1, corners, generator=generator)
    return [crop_resize(images, top, left, SIDE) for top, left in draws]


def main(steps: int = 200, batch_size: int = 128) -> list[float]:
    """Trains on noise with structure, in place of your images; returns the losses."""
    rank = int(os.environ.get("RANK", "0"))
    # the weights are the same on every rank, the images and their crops are each rank's own
    torch.manual_seed(0)
    encoder = make_encoder()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        encoder = DistributedDataParallel(encoder)
    generator = torch.Generator().manual_seed(1 + rank)
    # draws fresh slices at each call, the same on every rank, and adds up the sums of all ranks
    regularizer = SIGReg(num_slices=256)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)

    losses = []
    for _ in range(steps):
        coarse = torch.rand(batch_size, 3, 4, 4, generator=generator)
        images = nn.functional.interpolate(coarse, size=32, mode="bilinear")
        views = draw_views(images, generator)
        z = encoder(torch.cat(views)).unflatten(0, (VIEWS, batch_size))  # (V, B, D)
        agreement = (z - z.mean(0)).square().mean()
        # one test for each view, over the batch, as the author has it
        loss = (1 - LAMBDA) * agreement + LAMBDA * regularizer(z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    if dist.is_initialized():
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
