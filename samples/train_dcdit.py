"""Train a DC-DiT, which keeps the tokens that a picture needs, on small digits (some 0.25 s of one CPU core a step of 32).

    python samples/train_dcdit.py --run runs/dcdit-mnist --batch 32 --output dcdit-mnist.safetensors
    python samples/train_dcdit.py --run runs/dit --batch 32 --output dit.safetensors --plain

The recipe of arXiv 2603.06351: DDPM's loss with a learned variance, a ratio loss that holds the share of kept tokens near a
quarter, and, after a warm-up, a fraction of them dropped in each step, so that the model learns to do with fewer. One thing is not
the paper's: the model predicts v, not the noise. Where noise is nearly all of the sample, the noise's error says next to nothing of
the picture, and a run of minutes never gets to it.

Digits are halved to 14 x 14 pixels in a border of one, each pixel a token. With `--plain` it is an ordinary DiT of as many FLOPs as
the DC-DiT has at that quarter: patches of 2 x 2 pixels, and 9 blocks in place of 6.
"""

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dcdit
from digits import Digits, halved, load_digits
from elastic_export.families import elt
from elastic_export.families.dc_dit import model as dc_dit
from elastic_runtime.contract.schedule import LinearBeta
from training import Loss, drop_labels, parser, train

PARAMS = dc_dit.DcDitParams(
    input_size=16, in_channels=1, hidden_size=128, depth=6, num_heads=4, num_classes=10, dechunk_kernel_sigma=1.0, prediction="v"
)
PLAIN = elt.EltParams(
    input_size=16, patch_size=2, in_channels=1, hidden_size=128, num_heads=4, num_classes=10, unique_blocks=9, loops=1, max_loops=1,
    prediction="ddpm-v",
)  # fmt: skip
RATIO_WEIGHT, KEEP_ONE_IN, GROUP = 0.03, 4, 16
WARM_UP = 0.2  # of the steps; then a fraction of DROPS in each
DROPS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
LEVELS = 256


def small(digits: Digits) -> Digits:
    """Digits of 14 x 14 pixels and 256 grey levels with a border of 1, in [-1, 1]."""
    grey = halved(digits.images, LEVELS).astype(np.float32) / (LEVELS - 1) * 2 - 1
    return Digits(np.pad(grey, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1), digits.labels)


def ratio_loss(p: Tensor, natural: Tensor) -> Tensor:
    """`N/(N-1) ((1-F)(1-Q) + (N-1) F Q)` with F the kept share and Q the mean p (B, T) of a group; it pulls F to 1/N (section 3.4)."""
    kept, wanted = (x.float().reshape(-1, min(GROUP, len(p)) * p.shape[1]).mean(1) for x in (natural, p))
    n = KEEP_ONE_IN
    return (n / (n - 1) * ((1 - kept) * (1 - wanted) + (n - 1) * kept * wanted)).mean()


class Diffusion:
    """DDPM's forward process and the hybrid loss of improved DDPM (arXiv 2102.09672, section 3.1)."""

    def __init__(self, schedule: LinearBeta):
        product = torch.tensor([schedule.alpha_sigma(t)[0] ** 2 for t in range(-1, schedule.num_train_timesteps)], dtype=torch.float64)
        before, after = product[:-1], product[1:]
        beta = 1 - after / before
        posterior = beta * (1 - before) / (1 - after)
        self.steps = schedule.num_train_timesteps
        self.alpha, self.sigma = after.sqrt().float(), (1 - after).sqrt().float()
        self.log_beta = beta.log().float()
        self.log_posterior = torch.cat([posterior[1:2], posterior[1:]]).log().float()  # timestep 0 has none of its own
        # The posterior's mean is a x_0 + b x_t, so that of two means only the pictures differ.
        self.picture_weight = (before.sqrt() * beta / (1 - after)).float()

    def noised(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy images, their timesteps (B,) and the noise."""
        t = torch.randint(0, self.steps, (len(images),))
        noise = torch.randn_like(images)
        return self._at(self.alpha, t) * images + self._at(self.sigma, t) * noise, t, noise

    def _at(self, table: Tensor, t: Tensor) -> Tensor:
        return table[t][:, None, None, None]

    def hybrid_loss(self, prediction: Tensor, images: Tensor, noisy: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Squared error of v = alpha noise - sigma picture, and the bound in bits a pixel, which only the variance learns from."""
        v, place = prediction.float().chunk(2, dim=1)
        share = (place + 1) / 2
        log_variance = share * self._at(self.log_beta, t) + (1 - share) * self._at(self.log_posterior, t)
        alpha, sigma = self._at(self.alpha, t), self._at(self.sigma, t)
        picture = alpha * noisy - sigma * v.detach()
        off = self._at(self.picture_weight, t) * (picture - images)  # how far the predicted mean is off
        log_posterior = self._at(self.log_posterior, t)
        divergence = 0.5 * (log_variance - log_posterior + torch.exp(log_posterior - log_variance) + off**2 * torch.exp(-log_variance) - 1)
        bound = torch.where(t[:, None, None, None] == 0, self._surprise(images, picture, log_variance), divergence)
        return (v - (alpha * noise - sigma * images)).square().mean() + bound.mean() / math.log(2)

    def _surprise(self, images: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """-log of the probability of each pixel's grey level under a Gaussian; at timestep 0 the mean is the predicted picture."""
        half, scale = 1 / (LEVELS - 1), torch.exp(-0.5 * log_variance)
        below = torch.where(images < -0.999, 0.0, torch.special.ndtr((images - half - mean) * scale))
        above = torch.where(images > 0.999, 1.0, torch.special.ndtr((images + half - mean) * scale))
        return -torch.log((above - below).clamp(min=1e-12))


def recipe(plain: bool) -> Loss:
    """The loss of a step, of the DC-DiT or of the plain DiT."""
    diffusion = Diffusion(LinearBeta())

    def loss(model: Any, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        noisy, t, noise = diffusion.noised(images)
        classes = drop_labels(labels, PARAMS.num_classes)
        with sdpa_kernel(SDPBackend.MATH):  # for so few tokens on a CPU, the flash kernel's backward pass is the slower one
            if plain:
                return diffusion.hybrid_loss(model(noisy, t.float(), classes, 1), images, noisy, t, noise)
            drop = DROPS[int(torch.randint(len(DROPS), ()))] if progress >= WARM_UP else 0.0
            prediction, p, natural = dcdit.learn(model, noisy, t.float(), classes, torch.full((len(images),), drop))
        return diffusion.hybrid_loss(prediction, images, noisy, t, noise) + RATIO_WEIGHT * ratio_loss(p, natural)

    return loss


if __name__ == "__main__":
    options = parser(__doc__ or "", steps=5000)
    options.add_argument("--plain", action="store_true", help="a plain DiT of as many FLOPs, for comparison")
    given = options.parse_args()
    if given.compile and not given.plain:
        options.error("--compile compiles forward, and this recipe trains on more than forward tells: leave it out")
    data = small(load_digits()[0])
    if given.plain:
        train(lambda: elt.Elt(PLAIN), recipe(plain=True), given, {"family": elt.FAMILY.name, "config": asdict(PLAIN)}, data)
    else:
        train(lambda: dcdit.untrained(PARAMS), recipe(plain=False), given, {"family": dc_dit.FAMILY.name, "config": asdict(PARAMS)}, data)
