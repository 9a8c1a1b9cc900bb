"""train.py's --crop, --flip and --randaugment; apart, because importing torchvision is slow."""

from torchvision import transforms


class NeutralRandAugment(transforms.RandAugment):
    """RandAugment without the operations that can make "a red car" untrue."""

    KEPT = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Sharpness")

    def _augmentation_space(self, *args):
        return {k: v for k, v in super()._augmentation_space(*args).items() if k in self.KEPT}


def augmentation(size, crop, flip, randaugment):
    """-> a function from PIL image to PIL image that draws from torch's global generator.

    size: of a crop, in pixels. crop: the least area it keeps; 1: no cropping. randaugment: strength
    of two operations, 0 .. 30; 0: none.
    """
    T, bicubic = transforms, transforms.InterpolationMode.BICUBIC
    steps = [T.RandomResizedCrop(size, (crop, 1), interpolation=bicubic)] if crop < 1 else []
    steps += [T.RandomHorizontalFlip()] if flip else []
    steps += [NeutralRandAugment(num_ops=2, magnitude=randaugment)] if randaugment else []
    return T.Compose(steps)
