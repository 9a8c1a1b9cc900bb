"""Augmentation of the query model's images, by torchvision: `train.py --crop, --flip, --randaugment`.

A module of its own, since importing torchvision takes as long as importing torch, and most commands do without.
"""

from torchvision import transforms


class NeutralRandAugment(transforms.RandAugment):
    """RandAugment without the operations after which "a red car" is no longer true."""

    KEPT = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Sharpness")

    def _augmentation_space(self, *args):
        return {k: v for k, v in super()._augmentation_space(*args).items() if k in self.KEPT}


def augmentation(size, crop, flip, randaugment):
    """-> a function from PIL image to PIL image, drawn with torch's global generator.

    size: side of the crop in pixels; crop: the least share of the image's area that it shows (1: no cropping); flip: bool;
    randaugment: magnitude of two operations, 0 .. 30 (0: none).
    """
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.RandomResizedCrop(size, (crop, 1), interpolation=bicubic)] if crop < 1 else []
    steps += [transforms.RandomHorizontalFlip()] if flip else []
    steps += [NeutralRandAugment(num_ops=2, magnitude=randaugment)] if randaugment else []
    return transforms.Compose(steps)
