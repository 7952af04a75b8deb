"""The operations of RandAugment (arXiv:1909.13719), made of Pillow's."""

import functools

from PIL import Image, ImageEnhance, ImageOps

# Pixels that geometric operations uncover: the mean of "symmetric" preprocessing.
_FILL = 128


def _transform(image, *coefficients):
    fill = (_FILL,) * len(image.getbands())
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=fill)


def _rotate(image, degrees):
    fill = (_FILL,) * len(image.getbands())
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=fill)


def _enhance(enhancer, image, strength):
    return enhancer(image).enhance(1 + strength)


# {name: (operation(image, strength), strength at the largest magnitude, whether its sign is drawn)}: the paper's
# fourteen, with the ranges of torchvision's RandAugment. `strength` grows linearly with the magnitude.
OPERATIONS = {
    "identity": (lambda image, _: image, 0, False),
    "shear_x": (lambda image, shear: _transform(image, 1, shear, 0, 0, 1, 0), 0.3, True),
    "shear_y": (lambda image, shear: _transform(image, 1, 0, 0, shear, 1, 0), 0.3, True),
    "translate_x": (lambda image, part: _transform(image, 1, 0, part * image.width, 0, 1, 0), 150 / 331, True),
    "translate_y": (lambda image, part: _transform(image, 1, 0, 0, 0, 1, part * image.height), 150 / 331, True),
    "rotate": (_rotate, 30, True),
    "brightness": (functools.partial(_enhance, ImageEnhance.Brightness), 0.9, True),
    "color": (functools.partial(_enhance, ImageEnhance.Color), 0.9, True),
    "contrast": (functools.partial(_enhance, ImageEnhance.Contrast), 0.9, True),
    "sharpness": (functools.partial(_enhance, ImageEnhance.Sharpness), 0.9, True),
    "posterize": (lambda image, lost_bits: ImageOps.posterize(image, 8 - round(lost_bits)), 4, False),
    "solarize": (lambda image, part: ImageOps.solarize(image, round(256 * (1 - part))), 1, False),
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), 0, False),
    "equalize": (lambda image, _: ImageOps.equalize(image), 0, False),
}
