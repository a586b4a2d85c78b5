"""Only SIGReg, in a module of Lightning: its slices and its state dict go with the module's.

pip install lightning
python examples/sigreg_in_lightning.py
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastle

LAMBDA = 0.05  # weight of SIGReg


class LeJEPA(lightning.LightningModule):
    """Two noisy views of an image agree, and SIGReg keeps their embeddings Gaussian."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 64), nn.GELU(), nn.Linear(64, 16))
        # under DDP the samples of all ranks count together; a checkpoint holds which slices come next
        self.regularizer = fastle.SIGReg(num_slices=64)

    def training_step(self, images: Tensor, index: int) -> Tensor:
        views = torch.stack([images + 0.1 * torch.randn_like(images) for _ in range(2)])
        z = self.encoder(views.flatten(0, 1)).unflatten(0, views.shape[:2])  # (V, B, D)
        agreement = (z - z.mean(0)).square().mean()
        loss = (1 - LAMBDA) * agreement + LAMBDA * self.regularizer(z)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(images: int = 2048, **trainer: Any) -> LeJEPA:
    """Trains on noise, in place of your images."""
    loader: DataLoader[Tensor] = DataLoader(torch.rand(images, 3, 8, 8), batch_size=128)  # type: ignore[arg-type]
    module = LeJEPA()
    lightning.Trainer(**({"max_epochs": 4} | trainer)).fit(module, loader)
    return module


if __name__ == "__main__":
    print(f"loss {main().trainer.callback_metrics['loss']:.3f}")
