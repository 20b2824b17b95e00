"""The libraries that the time-to-quality benchmark runs beside miniai, behind one interface.

Each class wraps one library's own U-Net, noise schedule, loss, optimiser, weight average and
sampler. The recipe is the one its README or example script trains with; only what must shrink for
8x8 pictures and a minute on two processor cores was changed, always in the peer's favour, and
each class says what.

Every peer also gets what its own script does not have: the pictures held as one tensor (no
DataLoader, no decoding), the fused optimiser, a warm-up and cosine decay that fit the budget, and
no flips (a mirrored digit is no digit).

    # budget: the seconds the learning-rate decay is stretched over
    peer = Diffusers(size=8, seed=0, budget=60)
    # images (n, 1, 8, 8) in [-1, 1]; call again to continue
    seen = peer.train(images, seconds=60)
    new = peer.sample(1800, seed=1)                # (1800, 1, 8, 8) in [-1, 1]
"""

import contextlib
import io
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from miniai.callbacks import warmup_cosine

sys.path.append(str(Path(__file__).parent.parent))
from conftest import import_torchvision

# two peers import torchvision, whose compiled half is missing on some machines
import_torchvision()

import smalldiffusion
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from torch.optim.swa_utils import AveragedModel


class Peer:
    """One library: builds its model, trains it by the clock, samples from it.

    Subclasses fill in `build`, `step`, `draw`."""

    name = None
    lr, batch_size, warmup = 1e-3, 64, 0.05

    def __init__(self, size, seed, budget=60.0, clock=time.perf_counter):
        """`clock`: what counts the seconds; `time.process_time` counts only those this process
        had a core for. `size`: height and width of the (grey) pictures, a multiple of 4; `seed`:
        for weights, batches, times and noise; `budget`: all the seconds of training planned, over
        which the learning rate warms up and decays. For the fairest figure at a shorter time
        train a fresh peer with that budget. Raises ValueError for a size no U-Net here divides."""
        if size < 8 or size % 4:
            raise ValueError(
                f'size is {size}; the peers need a multiple of 4, at least 8: enlarge or pad'
            )
        self.size, self.budget, self.clock, self.spent, self.order = (
            size,
            budget,
            clock,
            0.0,
            torch.empty(0, dtype=torch.long),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = self.build()
            self.rng = torch.get_rng_state()

    def n_params(self):
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def train(self, images, seconds):
        """Train for `seconds` more on `images` (n, 1, size, size) in [-1, 1].

        Returns how many pictures were seen in this call."""
        seen = 0
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.rng)
            self.model.train()
            start = self.clock()
            while (now := self.clock() - start) < seconds:
                for group in self.opt.param_groups:
                    group['lr'] = self.lr * warmup_cosine(
                        (self.spent + now) / self.budget, self.warmup
                    )
                seen += self.step(self.next_batch(images))
            self.spent += self.clock() - start
            self.rng = torch.get_rng_state()
        return seen

    def next_batch(self, images):
        """The next `batch_size` of `images`, in an order shuffled anew each epoch.

        A last, smaller batch is dropped."""
        n = min(self.batch_size, len(images))
        if len(self.order) < n:
            self.order = torch.randperm(len(images))
        idx, self.order = self.order[:n], self.order[n:]
        return images[idx]

    def sample(self, n, seed, chunk=450):
        "`n` new pictures (n, 1, size, size) in [-1, 1], from the averaged weights."
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed)
            return torch.cat([self.draw(min(chunk, n - i)) for i in range(0, n, chunk)]).clamp(
                -1, 1
            )


class Diffusers(Peer):
    """`UNet2DModel` + `DDPMScheduler`, as in diffusers' train_unconditional.py: noise prediction,
    linear betas, AdamW with betas (0.95, 0.999), weight decay 1e-6, warm-up and cosine decay,
    gradient clip 1, EMA with power 3/4. Changed for the size: widths, one block per level,
    attention in the middle only, larger batch and lr. Changed because it halved the FID: cosine
    betas and v prediction (both options of the scheduler). Its own ancestral sampler, 150 steps."""

    name = 'diffusers'
    lr, batch_size, widths, layers, groups, steps = 3e-3, 64, (16, 32), 1, 8, 150
    betas, predicts = 'squaredcos_cap_v2', 'v_prediction'

    def build(self):
        widths = self.widths if self.size <= 8 else (*self.widths, self.widths[-1])
        model = UNet2DModel(
            sample_size=self.size,
            in_channels=1,
            out_channels=1,
            layers_per_block=self.layers,
            block_out_channels=widths,
            norm_num_groups=self.groups,
            down_block_types=('DownBlock2D',) * len(widths),
            up_block_types=('UpBlock2D',) * len(widths),
        )
        self.scheduler = DDPMScheduler(
            num_train_timesteps=1000, beta_schedule=self.betas, prediction_type=self.predicts
        )
        self.opt = torch.optim.AdamW(
            model.parameters(), lr=self.lr, betas=(0.95, 0.999), weight_decay=1e-6, fused=True
        )
        self.ema = EMAModel(
            model.parameters(),
            decay=0.9999,
            use_ema_warmup=True,
            inv_gamma=1.0,
            power=3 / 4,
            foreach=True,
        )
        return model

    def step(self, x):
        noise = torch.randn_like(x)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(x),))
        target = noise if self.predicts == 'epsilon' else self.scheduler.get_velocity(x, noise, t)
        loss = F.mse_loss(self.model(self.scheduler.add_noise(x, noise, t), t).sample, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.opt.step()
        self.opt.zero_grad()
        self.ema.step(self.model.parameters())
        return len(x)

    def draw(self, n):
        scheduler = DDPMScheduler.from_config(self.scheduler.config, timestep_spacing='trailing')
        scheduler.set_timesteps(self.steps)
        self.model.eval()
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        x = torch.randn(n, 1, self.size, self.size)
        for t in scheduler.timesteps:
            x = scheduler.step(self.model(x, t).sample, t, x).prev_sample
        self.ema.restore(self.model.parameters())
        return x


class DenoisingDiffusionPytorch(Peer):
    """`Unet` + `GaussianDiffusion`, as its Trainer: v prediction, sigmoid betas, Adam with betas
    (0.9, 0.99), gradient clip 1, EMA 0.995, its own DDIM (eta 1). Changed for the size: width,
    multipliers, larger lr and batch; above 8x8 fewer and narrower attention heads, which it has
    at every level: 2.2 times as many pictures a second. Changed for the short run: the EMA
    follows every step (every 10th, its Trainer's habit, more than doubled the FID) and the lr,
    constant in the Trainer, decays."""

    name = 'denoising-diffusion-pytorch'
    lr, batch_size, dim, mults, head_dim, heads, steps = 4e-3, 64, 16, (1, 2), 32, 4, 50
    betas, eta = 'sigmoid', 1.0

    def build(self):
        mults = self.mults if self.size <= 8 else (*self.mults, self.mults[-1])
        head_dim, heads = (self.head_dim, self.heads) if self.size <= 8 else (16, 2)
        unet = Unet(
            dim=self.dim, dim_mults=mults, channels=1, attn_dim_head=head_dim, attn_heads=heads
        )
        model = GaussianDiffusion(
            unet,
            image_size=self.size,
            timesteps=1000,
            sampling_timesteps=self.steps,
            beta_schedule=self.betas,
            ddim_sampling_eta=self.eta,
            auto_normalize=False,
        )
        self.opt = torch.optim.Adam(model.parameters(), lr=self.lr, betas=(0.9, 0.99), fused=True)
        self.ema = EMA(model, beta=0.995, update_every=1, include_online_model=False)
        return model

    def step(self, x):
        self.model(x).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.opt.step()
        self.opt.zero_grad()
        self.ema.update()
        return len(x)

    def draw(self, n):
        self.ema.ema_model.eval()
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
            return self.ema.ema_model.sample(batch_size=n)


class SmallDiffusion(Peer):
    """`Scaled(Unet)`, AdamW and EMA 0.999 as in its Fashion-MNIST example, with its own `PredV`,
    `ScheduleCosine` and DDPM sampler (gam 1, mu 0.5; 100 steps): with the example's noise
    prediction, log-linear schedule and 20 steps with gam 1.6 no net tried here came near in a
    minute. Changed for the size: width (its GroupNorm has 32 groups: no width below 32 works),
    levels, one block per level, attention at the coarsest, no dropout, smaller batch, lr decay
    (constant there)."""

    name = 'smalldiffusion'
    lr, batch_size, width, mults, blocks, dropout, steps, gam, mu = (
        2e-3,
        64,
        32,
        (1, 2),
        1,
        0.0,
        100,
        1.0,
        0.5,
    )

    def build(self):
        mults = self.mults if self.size <= 8 else (*self.mults, self.mults[-1])
        self.schedule = smalldiffusion.ScheduleCosine(1000)
        model = smalldiffusion.PredV(smalldiffusion.Scaled(smalldiffusion.Unet))(
            self.size,
            1,
            1,
            ch=self.width,
            ch_mult=mults,
            dropout=self.dropout,
            num_res_blocks=self.blocks,
            attn_resolutions=(self.size // 2 ** (len(mults) - 1),),
        )
        self.opt = torch.optim.AdamW(model.parameters(), lr=self.lr, fused=True)
        self.ema = AveragedModel(model, multi_avg_fn=ema_from_start(0.999))
        return model

    def step(self, x):
        x0, sigma, eps, _ = smalldiffusion.generate_train_sample(x, self.schedule)
        self.model.get_loss(x0, sigma, eps).backward()
        self.opt.step()
        self.opt.zero_grad()
        self.ema.update_parameters(self.model)
        return len(x)

    def draw(self, n):
        *_, x0 = smalldiffusion.samples(
            self.ema.module,
            self.schedule.sample_sigmas(self.steps),
            gam=self.gam,
            mu=self.mu,
            batchsize=n,
        )
        return x0


def ema_from_start(decay):
    """torch_ema's average, which the smalldiffusion examples use.

    It keeps `decay`, but (1 + n) / (10 + n) while that is smaller."""

    def update(averaged, current, n):
        d = min(decay, (1 + int(n)) / (10 + int(n)))
        torch._foreach_lerp_(list(averaged), list(current), 1 - d)

    return update


PEERS = (Diffusers, DenoisingDiffusionPytorch, SmallDiffusion)
