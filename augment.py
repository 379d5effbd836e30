"""Batched augmentation on the images' device: preprocessing, noise, T_a and its mixing, AugMix.

Sec. 3 (a), (b) and Fig. 1 of the paper, the preprocessing of Sec. 4, and AugMix (Hendrycks et al.,
2020) for Eq. (5). Everything is drawn per image from torch's global generators: noise on the
device, all else (operation, level, depth, order, mixing weights) on the host, so that images are
grouped by operation without waiting for the device.

Images are uint8 levels (B, 3, H, W) or floats in [0, 1] of that shape. The operations follow
Pillow: those on levels bit for bit, the geometric ones on 99% of the values and within one level
on nearly all the rest. This file needs torch alone.
"""

from collections.abc import Callable
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

A = ("autocontrast", "equalize", "posterize", "solarize")  # MAGNMA's set A
OPERATIONS = (*A, "rotate", "shear_x", "shear_y", "translate_x", "translate_y")  # AugMix's nine

JITTER = 0.25  # Sec. 4: colour jitter, factors in [1 - JITTER, 1 + JITTER]
DEGREES = 2.0  # Sec. 4: rotation, angles in [-DEGREES, DEGREES]
PADDING = 4  # Sec. 4: random crop
RED, GREEN, BLUE = 19595 / 65536, 38470 / 65536, 7471 / 65536  # Pillow's weights of grey
WIDTH, DEPTH = 3, 3  # AugMix: chains per image, most operations per chain
CHUNK, LARGE_CHUNK = 256, 8192  # images at a time on a CPU and on a GPU


def check_images(x: Tensor) -> None:
    """Raise ValueError unless x is a float tensor (B, 3, H, W) with values in [0, 1], +-0.001.

    On a GPU the values are checked without waiting for the device: if they are out of range, a
    later CUDA call fails and the message is on stderr. On other devices and under torch.compile
    only shape and type are checked.
    """
    expected = "expected floats (B, 3, H, W) in [0, 1]"
    if x.dim() != 4 or x.shape[1] != 3 or not x.is_floating_point():
        raise ValueError(f"images are {x.dtype} {tuple(x.shape)}; {expected}")
    if x.device.type not in ("cpu", "cuda") or x.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = x.detach().aminmax()
    in_range = (low >= -0.001) & (high <= 1.001)  # false for NaN
    if x.is_cuda:
        torch._assert_async(in_range, f"images have values outside [0, 1] or NaN; {expected}")
    elif not in_range:
        raise ValueError(
            f"images have values from {low:.3g} to {high:.3g}; {expected}."
            " A normalisation belongs inside the network"
        )


def in_chunks(function: Callable[..., Tensor], images: Tensor, *arguments: Tensor) -> Tensor:
    """Apply `function` to images and arguments, all (B, ...), in chunks sized for the device."""
    size = CHUNK if images.device.type == "cpu" else LARGE_CHUNK
    chunks = zip(*(values.split(size) for values in (images, *arguments)), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks])


# Operations on levels, bit for bit Pillow's ImageOps


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to 0..255; constant channels are unchanged. uint8 (B, 3, H, W)."""
    check_levels(images)
    pixels = images.flatten(2)
    low, high = pixels.amin(2, keepdim=True).double(), pixels.amax(2, keepdim=True).double()
    level = torch.arange(256, dtype=torch.float64, device=images.device)
    # Rounded as in Pillow; `255 / tensor` would multiply by a reciprocal, which rounds twice
    scale = torch.full_like(high, 255) / (high - low).clamp(min=1)
    stretched = (level * scale - low * scale).clamp(0, 255)
    return look_up(images, torch.where(high > low, stretched, level).to(torch.uint8))


def equalize(images: Tensor) -> Tensor:
    """Flatten each channel's histogram. uint8 (B, 3, H, W).

    Level i becomes floor((step // 2 + number of pixels below i) / step), where step is
    floor((pixels - pixels at the highest level present) / 255). With step 0 nothing changes.
    """
    check_levels(images)
    index = images.flatten(2).long()
    counts = torch.zeros(*index.shape[:2], 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(2, index, torch.ones_like(index, dtype=torch.int32))
    highest = images.flatten(2).amax(2, keepdim=True).long()
    step = (index.shape[2] - counts.gather(2, highest)) // 255
    below = counts.cumsum(2, dtype=torch.int32) - counts
    # in float32: exact below 2**23 pixels, and ten times as fast on a CPU as integer division
    flat = ((step // 2 + below) / step.clamp(min=1)).floor_().clamp_(max=255)
    level = torch.arange(256, dtype=torch.float32, device=images.device)
    return look_up(images, to_uint8(torch.where(step > 0, flat, level)))


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the `bits` highest bits, (B,) in 0..8 (0: black). uint8 (B, 3, H, W)."""
    check_levels(images, bits)
    mask = torch.bitwise_right_shift(0xFF00, bits.int()) & 0xFF
    return images & mask.to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert values from `threshold` on, (B,) in 0..256 (256: none). uint8 (B, 3, H, W)."""
    check_levels(images, threshold)
    inverted = images >= threshold.to(torch.int16).view(-1, 1, 1, 1)
    return images ^ (255 * inverted.to(torch.uint8))  # 255 - v is v ^ 255


def look_up(images: Tensor, table: Tensor) -> Tensor:
    """table[b, c, images[b, c, ...]] with a table (B, 3, 256)."""
    return table.gather(2, images.flatten(2).long()).view_as(images)


def check_levels(images: Tensor, level: Tensor | None = None) -> None:
    """Raise ValueError unless images are uint8 (B, 3, H, W) and level, if given, is (B,)."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        shape = tuple(images.shape)
        raise ValueError(f"images are {images.dtype} {shape}; expected uint8 (B, 3, H, W)")
    if level is not None and level.shape != images.shape[:1]:
        shape = tuple(level.shape)
        raise ValueError(f"levels have shape {shape}; expected one per image, ({len(images)},)")


# Geometry. A matrix (B, 6) maps positions in the result to positions in the source, as in Pillow;
# pixel centres are at +0.5.


def rotation_matrix(degrees: Tensor, height: int, width: int) -> Tensor:
    """Pillow's Image.rotate: counter-clockwise about the centre. (B,) -> float64 (B, 6)."""
    angle = -torch.deg2rad(degrees.double())
    cos, sin, x, y = angle.cos(), angle.sin(), width / 2, height / 2
    return torch.stack([cos, sin, x - x * cos - y * sin, -sin, cos, y + x * sin - y * cos], 1)


def affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Pillow's transform(AFFINE, matrix, BILINEAR), black outside. uint8 (B, 3, H, W), (B, 6)."""
    check_levels(images)
    height, width = images.shape[2:]
    matrix = matrix * matrix.new_tensor([2 / width] * 3 + [2 / height] * 3)  # grid_sample's units
    matrix = matrix.float().to(images.device, non_blocking=True)
    per_x, per_y, offset = matrix.view(-1, 2, 3, 1, 1).unbind(2)
    y, x = rows_and_columns(images)
    # (B, 2, H, W): x and y in the source, from -1 (the image's first edge) to 1 (its last)
    source = per_x * (x + 0.5) + (per_y * (y + 0.5) + (offset - 1))
    inside = (source + 2**-24).abs_().amax(1, keepdim=True).lt_(1)  # -1 <= source < 1
    grid = source.permute(0, 2, 3, 1)
    values = F.grid_sample(images.float(), grid, "bilinear", "border", align_corners=False)
    # Pillow truncates. 2**-10 keeps integer results from falling a level by float32's rounding
    return to_uint8(values.add_(2**-10).mul_(inside))


def rows_and_columns(images: Tensor) -> tuple[Tensor, Tensor]:
    """The row and column numbers of the pixels, int32 (H, 1) and (W,)."""
    height, width = images.shape[2:]
    rows = torch.arange(height, dtype=torch.int32, device=images.device)
    return rows.view(-1, 1), torch.arange(width, dtype=torch.int32, device=images.device)


def gather_pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """images[b, :, rows, columns], black outside; integers that broadcast to (B, H, W)."""
    count, channels, height, width = images.shape
    # in the image padded by 1, where the pixel (-1, -1) has index 0
    index = rows.clamp(-1, height) * (width + 2) + columns.clamp(-1, width) + (width + 3)
    index = index.long().view(count, 1, height * width).expand(-1, channels, -1)
    return F.pad(images, (1, 1, 1, 1)).flatten(2).gather(2, index).view_as(images)


def crop_and_flip(images: Tensor, crop: Tensor) -> Tensor:
    """Crop the image padded by 4 (black), then mirror it.

    crop is (B, 3): the crop's top and left corner in 0..8, and whether to mirror (0 or 1).
    """
    top, left, flip = crop.int().view(-1, 3, 1, 1).unbind(1)
    y, x = rows_and_columns(images)
    x = torch.where(flip > 0, x.flip(0), x)
    return gather_pixels(images, y + (top - PADDING), x + (left - PADDING))


def translate(images: Tensor, shift: Tensor) -> Tensor:
    """Pillow's transform(AFFINE, (1, 0, x, 0, 1, y)), shift int32 (B, 2) = (x, y) in pixels."""
    dx, dy = shift.view(-1, 2, 1, 1).unbind(1)
    y, x = rows_and_columns(images)
    return gather_pixels(images, y + dy, x + dx)


def rotate_nearest(images: Tensor, matrix: Tensor) -> Tensor:
    """Pillow's transform(AFFINE, matrix, NEAREST), black outside; matrix from `fixed_point`."""
    a, b, c, d, e, f = matrix.view(-1, 6, 1, 1).unbind(1)
    y, x = rows_and_columns(images)
    return gather_pixels(images, (d * x + (e * y + f)) >> 16, (a * x + (b * y + c)) >> 16)


def fixed_point(matrix: Tensor) -> Tensor:
    """Pillow's matrix for NEAREST: in units of 2**-16, half a pixel added. float64 -> int32."""
    a, b, c, d, e, f = matrix.unbind(1)
    centred = torch.stack([a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5], 1)
    return torch.floor(centred * 65536 + 0.5).int()


# Preprocessing (Sec. 4)


def colour_jitter(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Brightness (0), contrast (1) and saturation (2). uint8 (B, 3, H, W).

    order (B, 3) is each image's order of the three, factors (B, 3) the factor of each. All three
    are Pillow's blend, f x + (1 - f) other truncated to a level, with black, the mean grey or each
    pixel's grey as `other`. Grey is exact in float32: in units of 2**-16 it is an integer below
    2**24.
    """
    x = images.float()
    for kind in order.long().view(-1, 3, 1, 1).unbind(1):
        red, green, blue = x.split(1, 1)
        grey = (RED * red).add_(green, alpha=GREEN).add_(blue, alpha=BLUE).add_(0.5).floor_()
        mean = (grey.mean((2, 3), keepdim=True) + 0.5).floor()
        kind = kind.unsqueeze(1)
        other = torch.where(kind == 2, grey, torch.where(kind == 1, mean, 0.0))
        factor = factors.gather(1, kind.view(-1, 1)).view(-1, 1, 1, 1)
        x = (x - other).mul_(factor).add_(other).clamp_(0, 255).floor_()
    return to_uint8(x)


def preprocess(u8: Tensor, hflip: bool) -> Tensor:
    """The preprocessing of Sec. 4, as by torchvision's transforms on Pillow images.

    Random crop with padding 4, mirroring (if hflip), colour jitter 0.25, rotation up to 2 degrees
    (nearest, black). uint8 (N, 3, H, W) -> the same. Meant for all images of an epoch at once.
    Raises ValueError for images in the wrong format.
    """
    check_levels(u8)
    crop, order, factors, degrees = draw_preprocessing(len(u8), hflip)
    matrix = fixed_point(rotation_matrix(degrees, *u8.shape[2:]))

    def apply(
        images: Tensor, crop: Tensor, order: Tensor, factors: Tensor, matrix: Tensor
    ) -> Tensor:
        return rotate_nearest(colour_jitter(crop_and_flip(images, crop), order, factors), matrix)

    draws = (draw.to(u8.device, non_blocking=True) for draw in (crop, order, factors, matrix))
    return in_chunks(apply, u8, *draws)


def draw_preprocessing(count: int, hflip: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The draws of `preprocess` on the host: crop, order, factors (count, 3), degrees (count,)."""
    corner = torch.randint(0, 2 * PADDING + 1, (count, 2))
    mirrored = (
        torch.randint(0, 2, (count, 1)) if hflip else torch.zeros(count, 1, dtype=torch.int64)
    )
    order = torch.tensor(list(permutations(range(3))))[torch.randint(0, 6, (count,))]
    factors = 1 + JITTER * (2 * torch.rand(count, 3) - 1)
    degrees = DEGREES * (2 * torch.rand(count) - 1)
    return torch.cat([corner, mirrored], 1), order, factors, degrees


# MAGNMA's perturbations (Sec. 3 (a) and (b), Algorithm 1)


def gaussian_noise(x: Tensor, sigma_max: float) -> Tensor:
    """x + delta, delta ~ N(0, sigma^2 I), sigma ~ U(0, sigma_max) per image; not clipped.

    x is (B, 3, H, W) in [0, 1]; other images raise ValueError (`check_images`).
    """
    check_images(x)
    sigma = sigma_max * torch.rand(len(x), 1, 1, 1, dtype=x.dtype, device=x.device)
    return torch.randn_like(x).mul_(sigma).add_(x)


def mixed_augmentation(x: Tensor, beta: float, operations: str = "A") -> Tensor:
    """x_a(w) = w x + (1 - w) T_a(x), a ~ U(A) and w ~ Beta(beta, beta) per image.

    (B, 3, H, W) in [0, 1] -> the same; T_a works on the nearest of 256 levels. operations: "A"
    draws from the four in the paper's text, "augmix" from AugMix's nine. Raises ValueError for
    another name, for beta <= 0, and for other images (`check_images`).
    """
    check_images(x)
    a, v, w = draw_mixed(len(x), beta, operations)
    w = w.to(x.device, x.dtype, non_blocking=True).view(-1, 1, 1, 1)
    return in_chunks(mix, x, a, v, w)


def draw_mixed(count: int, beta: float, operations: str = "A") -> tuple[Tensor, Tensor, Tensor]:
    """The draws of `mixed_augmentation`, (count,) on the host: a into OPERATIONS, level v, w.

    The paper's intensity u ~ U{1..10} is a severity, as in AugMix: the level is |v| ~ U(0.1, u).
    With "augmix" v has a random sign, the direction of the geometric operations.
    """
    if operations not in ("A", "augmix"):
        raise ValueError(f"operations must be 'A' or 'augmix', not {operations!r}")
    a = torch.randint(0, len(A if operations == "A" else OPERATIONS), (count,))
    u = torch.randint(1, 11, (count,))
    v = 0.1 + (u - 0.1) * torch.rand(count, dtype=torch.float64)
    if operations == "augmix":
        v = v * (2 * torch.randint(0, 2, (count,)) - 1)
    concentration = torch.tensor(beta, dtype=torch.float64)
    # raises ValueError for beta <= 0
    w = torch.distributions.Beta(concentration, concentration).sample((count,))
    return a, v, w


def mix(x: Tensor, a: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """w x + (1 - w) T_a(x) for w (B, 1, 1, 1); a and v as in `apply_operations`."""
    levels = apply_operations(to_levels(x), a, v)
    return levels.to(x.dtype).mul_((1 - w) / 255).addcmul_(w, x)


def to_levels(x: Tensor) -> Tensor:
    """The nearest of 256 levels: [0, 1] -> uint8."""
    return to_uint8((x * 255).round_().clamp_(0, 255))


def to_uint8(x: Tensor) -> Tensor:
    """Truncate floats in [0, 256) to uint8; by way of int32, which is twice as fast on CPUs."""
    return x.int().to(torch.uint8)


# AugMix (Hendrycks et al., 2020)


def apply_operations(images: Tensor, op: Tensor, v: Tensor) -> Tensor:
    """Apply to each image its operation, an index into OPERATIONS (-1: none), at level |v|.

    images uint8 (B, 3, H, W); op and v (B,) on the host.
    """
    result = torch.empty_like(images)
    for k in op.unique().tolist():
        where = (op == k).nonzero().squeeze(1)
        there = where.to(images.device, non_blocking=True)
        group = images.index_select(0, there)
        if k >= 0:
            group = apply_operation(OPERATIONS[k], group, v[where].double())
        result.index_copy_(0, there, group)
    return result


def apply_operation(name: str, images: Tensor, v: Tensor) -> Tensor:
    """One of OPERATIONS on AugMix's scale: levels |v| in [0.1, 10], (B,) on the host.

    posterize keeps 4 - floor(4 |v| / 10) bits, at least one; solarize inverts from
    256 - floor(256 |v| / 10) on; rotation is by floor(30 |v| / 10) degrees, shear by 0.3 |v| / 10,
    translation by floor(W / 3 |v| / 10) or floor(H / 3 |v| / 10) pixels. The sign of v is the
    direction of these three. uint8 (B, 3, H, W) -> the same.
    """
    height, width = images.shape[2:]
    one, zero = torch.ones_like(v), torch.zeros_like(v)

    def level(values: Tensor) -> Tensor:
        return values.int().to(images.device, non_blocking=True)

    if name == "autocontrast":
        return autocontrast(images)
    if name == "equalize":
        return equalize(images)
    if name == "posterize":
        return posterize(images, level((4 - (4 * v.abs() / 10).floor()).clamp(min=1)))
    if name == "solarize":
        return solarize(images, level(256 - (256 * v.abs() / 10).floor()))
    if name == "rotate":
        return affine(images, rotation_matrix((30 * v / 10).trunc(), height, width))
    if name == "shear_x":
        return affine(images, torch.stack([one, 0.3 * v / 10, zero, zero, one, zero], 1))
    if name == "shear_y":
        return affine(images, torch.stack([one, zero, zero, 0.3 * v / 10, one, zero], 1))
    if name == "translate_x":
        return translate(images, level(torch.stack([(width / 3 * v / 10).trunc(), zero], 1)))
    return translate(images, level(torch.stack([zero, (height / 3 * v / 10).trunc()], 1)))


def augmix(x: Tensor) -> Tensor:
    """(1 - m) x + m sum_i w_i chain_i(x), drawn for each image. (B, 3, H, W) in [0, 1] -> the same.

    Each of three chains is 1 to 3 operations on levels, one after another; m ~ Beta(1, 1),
    w ~ Dirichlet(1). Raises ValueError for other images (`check_images`).
    """
    check_images(x)
    op, v, weights, m = draw_augmix(len(x))
    weights = weights.to(x.device, x.dtype, non_blocking=True)
    m = m.to(x.device, x.dtype, non_blocking=True)
    return in_chunks(mix_chains, x, op, v, weights, m)


def draw_augmix(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The draws of `augmix` on the host: op, v (count, WIDTH, DEPTH), w (count, WIDTH), m (count,).

    The levels are |v| ~ U(0.1, u) with u ~ U{1..10} the image's severity. op is -1 past the end of
    a chain.
    """
    length = torch.randint(1, DEPTH + 1, (count, WIDTH, 1))
    op = torch.randint(0, len(OPERATIONS), (count, WIDTH, DEPTH))
    u = torch.randint(1, 11, (count, 1, 1))
    v = 0.1 + (u - 0.1) * torch.rand(count, WIDTH, DEPTH, dtype=torch.float64)
    v = v * (2 * torch.randint(0, 2, (count, WIDTH, DEPTH)) - 1)
    op = torch.where(torch.arange(DEPTH) < length, op, -1)
    weights = torch.distributions.Dirichlet(torch.ones(WIDTH)).sample((count,))
    return op, v, weights, torch.rand(count)


def mix_chains(x: Tensor, op: Tensor, v: Tensor, weights: Tensor, m: Tensor) -> Tensor:
    """(1 - m) x + m sum_i w_i chain_i(x), with the draws of `draw_augmix`."""
    op, v = (draw.transpose(0, 1).reshape(-1, DEPTH) for draw in (op, v))  # chain by chain
    chains = to_levels(x).repeat(WIDTH, 1, 1, 1)
    for step in range(DEPTH):
        chains = apply_operations(chains, op[:, step], v[:, step])
    m = m.view(-1, 1, 1, 1)
    mixed = (1 - m) * x
    for w, chain in zip(weights.unbind(1), chains.chunk(WIDTH), strict=True):
        mixed.addcmul_(m / 255 * w.view(-1, 1, 1, 1), chain.to(x.dtype))
    return mixed
