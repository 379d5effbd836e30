"""Batched augmentations on the images' device: preprocessing, Gaussian noise, T_a and its mixing, AugMix chains.

Sec. 3 (a), (b) and Fig. 1 of the paper, the preprocessing of Sec. 4, and AugMix (Hendrycks et al., 2020) for Eq. (5).
Every draw is made per image, from torch's global generators: noise on the device, everything else (operation, level,
depth, order, mixing weights) on the host, so that images are grouped by operation without waiting for the device.

Images are uint8 levels (B, 3, H, W) or floats in [0, 1] of that shape. The operations follow Pillow: those on levels
bit for bit, the geometric ones on 99% of the values, and within one level on nearly all the rest.
"""

from collections.abc import Callable
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

A = ("autocontrast", "equalize", "posterize", "solarize")  # MAGNMA's set A
OPERATIONS = (*A, "rotate", "shear_x", "shear_y", "translate_x", "translate_y")  # AugMix's nine
ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = range(len(A), len(OPERATIONS))

JITTER = 0.25  # Sec. 4: colour jitter, factors in [1 - JITTER, 1 + JITTER]
DEGREES = 2.0  # Sec. 4: rotation, angles in [-DEGREES, DEGREES]
PADDING = 4  # Sec. 4: random crop
WIDTH, DEPTH = 3, 3  # AugMix: chains of an image, and the most operations of a chain
CHUNK, LARGE_CHUNK = 128, 8192  # images at a time on a CPU (1.5 MB of float32 values stay in its cache) and on a GPU


def in_pieces(function: Callable[..., Tensor], images: Tensor, *arguments: Tensor) -> Tensor:
    """function(images, *arguments), for as many images at a time as suit the device. The result is the same."""
    size = CHUNK if images.device.type == "cpu" else LARGE_CHUNK
    if len(images) <= size:
        return function(images, *arguments)
    pieces = zip(*(values.split(size) for values in (images, *arguments)), strict=True)
    first = function(*next(pieces))
    result = first.new_empty(len(images), *first.shape[1:])
    result[:size] = first
    for k, piece in enumerate(pieces, 1):
        result[k * size : (k + 1) * size] = function(*piece)
    return result


# Operations on levels: one level per image, bit for bit Pillow's ImageOps


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to the full range; a channel of one level stays. uint8 (B, 3, H, W) -> the same."""
    check_levels(images)
    pixels = images.flatten(2)
    lo, hi = pixels.amin(2, keepdim=True).double(), pixels.amax(2, keepdim=True).double()
    level = torch.arange(256, dtype=torch.float64, device=images.device)
    # Pillow's float64 to the last bit; `255 / tensor` would be a reciprocal and a product, rounded twice
    scale = torch.full_like(hi, 255) / (hi - lo).clamp(min=1)
    stretched = (level * scale - lo * scale).clamp(0, 255)
    return _look_up(images, torch.where(hi > lo, stretched, level).to(torch.uint8))


def equalize(images: Tensor) -> Tensor:
    """Flatten each channel's histogram. uint8 (B, 3, H, W) -> the same.

    Level i becomes floor((step // 2 + number of pixels below i) / step), step = floor((pixels - pixels at the highest
    level present) / 255); where step is 0 the channel stays.
    """
    check_levels(images)
    index = images.flatten(2).long()
    one = torch.ones((), dtype=torch.int32, device=images.device)
    counts = torch.zeros(*index.shape[:2], 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(2, index, one.expand_as(index))
    step = (index.shape[2] - counts.gather(2, index.amax(2, keepdim=True))) // 255
    below = counts.cumsum(2, dtype=torch.int32) - counts
    flat = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    level = torch.arange(256, dtype=torch.int32, device=images.device)
    return _look_up(images, torch.where(step > 0, flat, level).to(torch.uint8))


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the `bits` highest bits of each value, bits (B,) in 0..8 (0: black). uint8 (B, 3, H, W) -> the same."""
    check_levels(images, bits)
    mask = torch.bitwise_right_shift(0xFF00, bits.int()) & 0xFF
    return images & mask.to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values at and above `threshold`, (B,) in 0..256 (256: none). uint8 (B, 3, H, W) -> the same."""
    check_levels(images, threshold)
    inverted = images >= threshold.to(torch.int16).view(-1, 1, 1, 1)
    return images ^ (255 * inverted.to(torch.uint8))  # 255 - v is v ^ 255; a where on bytes is slow on CPUs


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """table[b, c, images[b, c, ...]] with a table (B, 3, 256)."""
    return table.gather(2, images.flatten(2).long()).view_as(images)


def check_levels(images: Tensor, level: Tensor | None = None) -> None:
    """Raise ValueError unless images are uint8 (B, 3, H, W) and level, where there is one, is (B,)."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (B, 3, H, W)")
    if level is not None and level.shape != images.shape[:1]:
        raise ValueError(f"levels have shape {tuple(level.shape)}; expected one per image, ({images.shape[0]},)")


# Geometry: matrices (B, 6) map a position of the result, pixel centres at +0.5, to one of the source, as in Pillow


def rotation_matrix(degrees: Tensor, size: int) -> Tensor:
    """Pillow's Image.rotate: counter-clockwise about the centre of a size x size image. (B,) -> float64 (B, 6)."""
    angle = -torch.deg2rad(degrees.double())
    cos, sin, c = angle.cos(), angle.sin(), size / 2
    return torch.stack([cos, sin, c - c * cos - c * sin, -sin, cos, c + c * sin - c * cos], 1)


def affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Pillow's transform(AFFINE, matrix, BILINEAR) with black outside. uint8 (B, 3, H, W), (B, 6) -> uint8."""
    check_levels(images)
    height, width = images.shape[2:]
    matrix = matrix * matrix.new_tensor([2 / width] * 3 + [2 / height] * 3)  # grid_sample's units
    per_x, per_y, offset = matrix.float().to(images.device, non_blocking=True).view(-1, 2, 3, 1, 1).unbind(2)
    y, x = _rows_and_columns(images)
    # (B, 2, H, W): x and y of the source, from -1 (the image's first edge) to 1 (its last)
    source = per_x * (x + 0.5) + (per_y * (y + 0.5) + (offset - 1))
    inside = (source + 2**-24).abs_().amax(1, keepdim=True).lt_(1)  # -1 <= source < 1
    values = F.grid_sample(images.float(), source.permute(0, 2, 3, 1), "bilinear", "border", align_corners=False)
    # Pillow truncates; 2**-10 lets what should be a whole level survive float32's rounding
    return to_uint8(values.add_(2**-10).mul_(inside))


def _rows_and_columns(images: Tensor) -> tuple[Tensor, Tensor]:
    """The row and column numbers of the pixels, int32 (H, 1) and (W,)."""
    height, width = images.shape[2:]
    rows = torch.arange(height, dtype=torch.int32, device=images.device)
    return rows.view(-1, 1), torch.arange(width, dtype=torch.int32, device=images.device)


def _pick(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """images[b, :, rows, columns], black outside the image; integer rows and columns broadcast to (B, H, W)."""
    count, channels, height, width = images.shape
    index = (rows.clamp(-1, height) + 1) * (width + 2) + (columns.clamp(-1, width) + 1)
    index = index.long().view(count, 1, height * width).expand(-1, channels, -1)
    return F.pad(images, (1, 1, 1, 1)).flatten(2).gather(2, index).view_as(images)


def crop_and_flip(images: Tensor, crop: Tensor) -> Tensor:
    """Shift and mirror. crop (B, 3): top and left corner in 0..8 of the image padded by 4, black; mirrored (0 or 1)."""
    top, left, flip = crop.int().view(-1, 3, 1, 1).unbind(1)
    y, x = _rows_and_columns(images)
    return _pick(images, y + (top - PADDING), torch.where(flip > 0, x.flip(0), x) + (left - PADDING))


def translate(images: Tensor, shift: Tensor) -> Tensor:
    """Pillow's transform(AFFINE, (1, 0, x, 0, 1, y)), shift int32 (B, 2) = (x, y) in pixels. uint8 -> the same."""
    dx, dy = shift.view(-1, 2, 1, 1).unbind(1)
    y, x = _rows_and_columns(images)
    return _pick(images, y + dy, x + dx)


def rotate_nearest(images: Tensor, matrix: Tensor) -> Tensor:
    """Pillow's transform(AFFINE, matrix, NEAREST), black outside; matrix int32 (B, 6) from `fixed_point`."""
    a, b, c, d, e, f = matrix.view(-1, 6, 1, 1).unbind(1)
    y, x = _rows_and_columns(images)
    return _pick(images, (d * x + (e * y + f)) >> 16, (a * x + (b * y + c)) >> 16)


def fixed_point(matrix: Tensor) -> Tensor:
    """Pillow's form for NEAREST: units of 2**-16 and the half pixel added to the offset. float64 (B, 6) -> int32."""
    a, b, c, d, e, f = matrix.unbind(1)
    centred = torch.stack([a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5], 1)
    return torch.floor(centred * 65536 + 0.5).int()


# Preprocessing (Sec. 4)


def colour_jitter(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Brightness (0), contrast (1), saturation (2), in each image's order (B, 3) with its factors (B, 3).

    Each is Pillow's blend f x + (1 - f) other, truncated to a level, with black, the mean grey or each pixel's grey as
    `other`, in float32 as Pillow does it; the greys' sums are whole numbers below 2**24. uint8 -> uint8 (B, 3, H, W).
    """
    x = images.float()
    for kind in order.long().view(-1, 3, 1, 1).unbind(1):
        grey = 19595 * x[:, :1] + 38470 * x[:, 1:2] + 7471 * x[:, 2:]
        grey = ((grey + 32768) * 2**-16).floor()
        mean = (grey.mean((2, 3), keepdim=True) + 0.5).floor()
        other = torch.where(kind.unsqueeze(1) == 2, grey, torch.where(kind.unsqueeze(1) == 1, mean, 0.0))
        factor = factors.gather(1, kind.view(-1, 1)).view(-1, 1, 1, 1)
        x = (x - other).mul_(factor).add_(other).clamp_(0, 255).floor_()
    return to_uint8(x)


def preprocess(u8: Tensor, hflip: bool) -> Tensor:
    """Sec. 4's preprocessing: random crop with padding 4, mirroring (if hflip), colour jitter 0.25, rotation up to 2
    degrees (nearest, black), as torchvision's transforms do on Pillow images. uint8 (N, 3, S, S) -> the same.

    Meant for all images of an epoch at once.
    """
    check_levels(u8)
    crop, order, factors, degrees = draw_preprocessing(len(u8), hflip)
    matrix = fixed_point(rotation_matrix(degrees, u8.shape[2]))

    def apply(images: Tensor, crop: Tensor, order: Tensor, factors: Tensor, matrix: Tensor) -> Tensor:
        return rotate_nearest(colour_jitter(crop_and_flip(images, crop), order, factors), matrix)

    draws = (values.to(u8.device, non_blocking=True) for values in (crop, order, factors, matrix))
    return in_pieces(apply, u8, *draws)


def draw_preprocessing(count: int, hflip: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The draws of `preprocess` on the host: crop, order and factors (count, 3), degrees (count,)."""
    corner = torch.randint(0, 2 * PADDING + 1, (count, 2))
    mirrored = torch.randint(0, 2, (count, 1)) if hflip else torch.zeros(count, 1, dtype=torch.int64)
    order = torch.tensor(list(permutations(range(3))))[torch.randint(0, 6, (count,))]
    factors = 1 + JITTER * (2 * torch.rand(count, 3) - 1)
    degrees = DEGREES * (2 * torch.rand(count) - 1)
    return torch.cat([corner, mirrored], 1), order, factors, degrees


# MAGNMA's perturbations (Sec. 3 (a) and (b), Algorithm 1)


def gaussian_noise(x: Tensor, sigma_max: float) -> Tensor:
    """x + delta, delta ~ N(0, sigma^2 I), sigma ~ U(0, sigma_max) per image, not clipped. (B, 3, H, W) -> the same."""
    sigma = sigma_max * torch.rand(len(x), 1, 1, 1, dtype=x.dtype, device=x.device)
    return x + sigma * torch.randn_like(x)


def mixed_augmentation(x: Tensor, beta: float, operations: str = "A") -> Tensor:
    """x_a(w) = w x + (1 - w) T_a(x), drawn for each image: a ~ U(A), w ~ Beta(beta, beta). [0, 1] -> [0, 1].

    x is (B, 3, S, S); T_a works on the nearest of 256 levels. operations: "A" draws from the four of the paper's text,
    "augmix" from AugMix's nine. Raises ValueError for another name, and unless beta is positive.
    """
    a, v, w = draw_mixed(len(x), beta, operations)
    w = w.to(x.device, x.dtype, non_blocking=True).view(-1, 1, 1, 1)
    return in_pieces(mix, x, w, operate(in_pieces(to_levels, x), a, v))


def draw_mixed(count: int, beta: float, operations: str = "A") -> tuple[Tensor, Tensor, Tensor]:
    """The draws of `mixed_augmentation`, each (count,) on the host: a, an index into OPERATIONS; its level v; w.

    The paper's intensity u ~ U{1..10} is a severity, as in AugMix: the level is |v| ~ U(0.1, u). With "augmix" v has a
    random sign, the direction of the geometric operations.
    """
    if operations not in ("A", "augmix"):
        raise ValueError(f"operations must be 'A' or 'augmix', not {operations!r}")
    a = torch.randint(0, len(A if operations == "A" else OPERATIONS), (count,))
    u = torch.randint(1, 11, (count,))
    v = 0.1 + (u - 0.1) * torch.rand(count, dtype=torch.float64)
    if operations == "augmix":
        v = v * (2 * torch.randint(0, 2, (count,)) - 1)
    concentration = torch.tensor(beta, dtype=torch.float64)
    w = torch.distributions.Beta(concentration, concentration).sample((count,))  # refuses beta <= 0
    return a, v, w


def mix(x: Tensor, w: Tensor, levels: Tensor) -> Tensor:
    """w x + (1 - w) levels / 255. [0, 1], (B, 1, 1, 1), uint8 -> [0, 1]."""
    return levels.to(x.dtype).mul_((1 - w) / 255).addcmul_(w, x)


def to_levels(x: Tensor) -> Tensor:
    """The nearest of 256 levels: [0, 1] -> uint8."""
    return to_uint8((x * 255).round_().clamp_(0, 255))


def to_uint8(x: Tensor) -> Tensor:
    """Truncate floats in [0, 256) to uint8; by way of int32, which is twice as fast on CPUs."""
    return x.int().to(torch.uint8)


# AugMix (Hendrycks et al., 2020)


def operate(images: Tensor, op: Tensor, v: Tensor) -> Tensor:
    """Apply to each image its operation, an index into OPERATIONS (-1: none), at level |v| in [0.1, 10].

    images uint8 (B, 3, S, S); op, v (B,) on the host. AugMix's scale: posterize keeps 4 - floor(4 |v| / 10) bits, at
    least one; solarize inverts from 256 - floor(256 |v| / 10); rotation by floor(30 |v| / 10) degrees, shear
    0.3 |v| / 10, translation by floor(S / 3 |v| / 10) pixels, and the sign of v is the direction of these three.
    """
    order = op.argsort()  # so that images of one operation are neighbours
    op, v = op[order], v[order].double()
    counts = torch.bincount(op + 1, minlength=len(OPERATIONS) + 1).tolist()  # of none and of each operation
    # the groups: none, the four of A, rotation and shears together, translations together
    sizes = [*counts[: ROTATE + 1], sum(counts[ROTATE + 1 : TRANSLATE_X + 1]), sum(counts[TRANSLATE_X + 1 :])]

    def grouped(values: Tensor) -> tuple[Tensor, ...]:
        return values.to(images.device, non_blocking=True).split(sizes)

    bits = grouped((4 - (4 * v.abs() / 10).floor()).clamp(min=1).int())
    threshold = grouped((256 - (256 * v.abs() / 10).floor()).int())
    matrix = _augmix_matrix(op, v, images.shape[2]).split(sizes)
    pixels = (images.shape[2] / 3 * v / 10).trunc()
    shift = grouped(torch.stack([pixels * (op == TRANSLATE_X), pixels * (op == TRANSLATE_Y)], 1).int())
    groups = images.index_select(0, order.to(images.device, non_blocking=True)).split(sizes)
    results = [
        groups[0],
        in_pieces(autocontrast, groups[1]),
        in_pieces(equalize, groups[2]),
        in_pieces(posterize, groups[3], bits[3]),
        in_pieces(solarize, groups[4], threshold[4]),
        in_pieces(affine, groups[5], matrix[5]),
        in_pieces(translate, groups[6], shift[6]),
    ]
    return torch.cat(results).index_select(0, order.argsort().to(images.device, non_blocking=True))


def _augmix_matrix(op: Tensor, v: Tensor, size: int) -> Tensor:
    """The matrices (B, 6) of AugMix's rotation and shears, op and v as in `operate`."""
    shear, one, zero = 0.3 * v / 10, torch.ones_like(v), torch.zeros_like(v)
    sheared = torch.stack([one, shear * (op == SHEAR_X), zero, shear * (op == SHEAR_Y), one, zero], 1)
    rotated = rotation_matrix((30 * v / 10).trunc(), size)
    return torch.where((op == ROTATE).unsqueeze(1), rotated, sheared)


def augmix(x: Tensor) -> Tensor:
    """(1 - m) x + m sum_i w_i chain_i(x), drawn anew for each image. [0, 1] (B, 3, S, S) -> the same.

    Each of the three chains is of 1 to 3 operations one after another on levels, m ~ Beta(1, 1), w ~ Dirichlet(1).
    """
    op, v, weights, m = draw_augmix(len(x))
    op, v = (draws.transpose(0, 1).reshape(-1, DEPTH) for draws in (op, v))  # all first chains, all second, all third
    weights, m = (draws.to(x.device, x.dtype, non_blocking=True) for draws in (weights, m.view(-1, 1, 1, 1)))
    chains = in_pieces(to_levels, x).repeat(WIDTH, 1, 1, 1)
    for step in range(DEPTH):
        chains = operate(chains, op[:, step], v[:, step])
    return in_pieces(mix_chains, x, m, weights, chains.view(WIDTH, *x.shape).transpose(0, 1))


def draw_augmix(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The draws of `augmix` on the host: op and v (count, WIDTH, DEPTH) as in `operate`, w (count, WIDTH), m (count,).

    The levels are |v| ~ U(0.1, u) with u ~ U{1..10} the image's severity. op is -1 after a chain's end.
    """
    length = torch.randint(1, DEPTH + 1, (count, WIDTH, 1))
    op = torch.randint(0, len(OPERATIONS), (count, WIDTH, DEPTH))
    u = torch.randint(1, 11, (count, 1, 1))
    v = 0.1 + (u - 0.1) * torch.rand(count, WIDTH, DEPTH, dtype=torch.float64)
    v = v * (2 * torch.randint(0, 2, (count, WIDTH, DEPTH)) - 1)
    op = torch.where(torch.arange(DEPTH) < length, op, -1)
    weights = torch.distributions.Dirichlet(torch.ones(WIDTH)).sample((count,))
    return op, v, weights, torch.rand(count)


def mix_chains(x: Tensor, m: Tensor, weights: Tensor, chains: Tensor) -> Tensor:
    """(1 - m) x + m sum_i w_i chain_i / 255. [0, 1], (B, 1, 1, 1), (B, width), uint8 (B, width, 3, S, S) -> [0, 1]."""
    mixed = (1 - m) * x
    for w, chain in zip(weights.unbind(1), chains.unbind(1), strict=True):
        mixed.addcmul_(m / 255 * w.view(-1, 1, 1, 1), chain.to(x.dtype))
    return mixed
