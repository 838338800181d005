"""An evaluation of one's own: a detector on generated images, with the candidate as its backbone.

Each image of 64x64 pixels shows one square or one disc on noise. torchvision's FCOS with a feature pyramid on the
candidate is trained briefly; the score is the share of images in which the box of the highest score has the right class
and meets the true box with an IoU above one half.
"""

import torch
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import box_iou

import placesearch as ps

SIDE, TRAIN, TEST = 64, 96, 96


def evaluate(candidate: ps.Candidate) -> dict[str, float]:
    """Train a detector on the candidate and return its accuracy and its last training loss."""
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    pyramid = BackboneWithFPN(candidate.build(), layers, [128, 256, 512], out_channels=64)
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)  # the pyramid adds a fourth level
    model = FCOS(
        pyramid,
        num_classes=2,
        anchor_generator=anchors,
        min_size=SIDE,
        max_size=SIDE,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).to(candidate.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, targets = draw(TRAIN, seed=0)
    order = torch.Generator().manual_seed(candidate.seed)
    model.train()
    loss = torch.zeros(())
    for _ in range(candidate.epochs):
        for batch in torch.randperm(TRAIN, generator=order).split(8):
            chosen = [targets[index] for index in batch.tolist()]
            loss = sum(model(list(images[batch]), chosen).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    seed = {"validation": 1, "test": 2}[candidate.split]  # the verdict gets images that no search has seen
    images, targets = draw(TEST, seed=seed)
    return {"accuracy": accuracy(model, images, targets), "loss": float(loss)}


def draw(count: int, seed: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Generate images (n, 3, side, side) and, for each, the box and the class of the one thing on it."""
    random = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.rand(count, 3, SIDE, SIDE, generator=random)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    targets = []
    for image in images:
        kind = int(torch.randint(2, (1,), generator=random))
        half = int(torch.randint(6, 15, (1,), generator=random))
        y, x = torch.randint(half, SIDE - half, (2,), generator=random).tolist()
        across, down = (columns - x).abs(), (rows - y).abs()
        inside = torch.maximum(across, down) < half if kind == 0 else across**2 + down**2 < half**2
        image += 0.5 * torch.rand(3, 1, 1, generator=random) * inside + 0.2 * inside
        box = torch.tensor([[x - half, y - half, x + half, y + half]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.tensor([kind])})
    return images, targets


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, targets: list[dict[str, torch.Tensor]]) -> float:
    """Return the share of images whose best box is right."""
    model.eval()
    right = 0
    for found, target in zip(model(list(images)), targets, strict=True):
        if len(found["scores"]):
            best = int(found["scores"].argmax())
            meets = box_iou(found["boxes"][best : best + 1], target["boxes"])[0, 0] > 0.5
            right += int(meets and found["labels"][best] == target["labels"][0])
    return right / len(images)
