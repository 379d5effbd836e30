"""Where random numbers come from: one object for the host's draws and the device's, or this process' share of them.

Whatever is drawn has the image as its first dimension. A run on two devices, or with a batch in micro-batches, makes
the very draws of a run on one: each process draws for the whole batch and keeps its images' part.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Draws:
    """Where random numbers come from, and which share of a global batch's draws is ours.

    host, device: the generators for discrete choices and for noise and weights; None is torch's global one.
    start, count, total: this process holds the images [start, start + count) of a batch of `total`. Every draw is then
    made for all `total` images and the share cut out, so that ranks and micro-batches that begin with equal generators
    make together the very draws of one process. total None: the images at hand are all there are.
    place: where device draws are delivered (a generator of another device draws there, and its numbers are moved).

    The first dimension of a shape counts images, or n copies of them one after the other, as x.repeat(n, 1, 1, 1) does.
    """

    host: torch.Generator | None = None
    device: torch.Generator | None = None
    start: int = 0
    count: int | None = None
    total: int | None = None
    place: torch.device = CPU

    def __post_init__(self):
        if self.total is not None and not 0 <= self.start < self.start + (self.count or 0) <= self.total:
            raise ValueError(f"{self.count} images from {self.start} on are no share of a batch of {self.total}")

    @classmethod
    def seeded(
        cls, seed: int, device: torch.device, *, start: int = 0, count: int | None = None, total: int | None = None
    ) -> "Draws":
        """Draws that depend on `seed` alone. On a CPU one generator serves both purposes: two would draw the same."""
        host = torch.Generator().manual_seed(seed)
        on_device = host if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
        return cls(host, on_device, start, count, total, device)

    @torch.compiler.disable
    def _draw(self, sample: Callable[..., Tensor], shape: tuple[int, ...], host: bool) -> Tensor:
        """Our share of sample(global shape, generator, device). ValueError where the first size is not n * count."""
        generator, place = (self.host, CPU) if host else (self.device, self.place)
        device = place if generator is None else generator.device
        if self.total is None:
            return sample(tuple(shape), generator, device).to(place, non_blocking=place != CPU)
        copies, rest = divmod(shape[0], self.count)
        if rest:
            raise ValueError(f"{shape[0]} images to draw for; expected copies of this share's {self.count} images")
        whole = sample((copies * self.total, *shape[1:]), generator, device)
        share = whole.view(copies, self.total, *shape[1:])[:, self.start : self.start + self.count]
        return share.reshape(shape).to(place, non_blocking=place != CPU)

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0, *, host: bool = False) -> Tensor:
        """U(low, high), float32."""
        values = self._draw(lambda size, g, d: torch.rand(size, generator=g, device=d), shape, host)
        return values if (low, high) == (0.0, 1.0) else low + (high - low) * values

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """N(0, 1), float32."""
        return self._draw(lambda size, g, d: torch.randn(size, generator=g, device=d), shape, False)

    def integers(self, shape: tuple[int, ...], low: int, high: int) -> Tensor:
        """Uniform on {low, ..., high - 1}, int64, on the host."""
        return self._draw(lambda size, g, d: torch.randint(low, high, size, generator=g, device=d), shape, True)

    def dirichlet(self, shape: tuple[int, ...]) -> Tensor:
        """Dirichlet(1, ..., 1) along the last dimension: normalised exponentials."""

        def sample(size: tuple[int, ...], g: torch.Generator | None, d: torch.device) -> Tensor:
            exponential = torch.empty(size, device=d).exponential_(generator=g)
            return exponential / exponential.sum(-1, keepdim=True)

        return self._draw(sample, shape, False)

    def beta(self, shape: tuple[int, ...], beta: float) -> Tensor:
        """Beta(beta, beta), beta > 0: G1 / (G1 + G2) of two Gamma(beta) variables.

        log Gamma(beta) is drawn as log Gamma(beta + 1) + log(U) / beta, which does not underflow for a small beta.
        """

        def sample(size: tuple[int, ...], g: torch.Generator | None, d: torch.device) -> Tensor:
            gamma = torch._standard_gamma(torch.full((2, *size), beta + 1.0, device=d), generator=g)
            log_gamma = gamma.log() + torch.log1p(-torch.rand((2, *size), generator=g, device=d)) / beta
            return torch.sigmoid(log_gamma[0] - log_gamma[1])

        return self.uniform(shape) if beta == 1 else self._draw(sample, shape, False)


def as_draws(generator: torch.Generator | Draws | None, x: Tensor) -> Draws:
    """The Draws of a `generator` argument, delivering to x's device. A plain generator serves host and device draws."""
    if not isinstance(generator, Draws):
        generator = Draws(generator, generator)
    return replace(generator, place=x.device)
