"""Makes the VAE's weights again: `miniai train vae` calls this. Lesson 31 explains the model."""
import copy
import time
from pathlib import Path

import torch

from miniai.autoencoder import (
    VAE,
    RandomBatches,
    VAELoss,
    autoencoder_learner,
    psnr,
)
from miniai.callbacks import ProgressCB, TimeBudgetCB
from miniai.captions import captioned_digits, train_judge
from miniai.checkpoint import CheckpointCB, checkpoints
from miniai.data import DataLoaders
from miniai.demo import pick_device
from miniai.learner import Callback
from miniai.muon import Muon, fast_bf16
from miniai.results import Results
from miniai.scaling import MixedPrecisionCB
from miniai.tensors import set_seed, to_cpu

BATCH_SIZE, STEPS_PER_EPOCH = 48, 100

CARD = """---
library_name: miniai
tags: [vae, digits]
---
# VAE for captioned digits

Pictures of 3x32x32 in [-1, 1] to latents of 4x4x4 and back: 48 times fewer numbers. Lesson 31 of
miniai explains it. `VAE.from_pretrained()` loads it; `vae.encode(x)*vae.scaling_factor` has unit
standard deviation.

- Data: `captioned_digits({data!r})`, {n_train:,} training pictures, {share:.0%} of them in random
  colours without a name; held-out handwriting for all figures.
- Training: `{command}`
- {steps:,} steps of {batch_size} pictures in {seconds:.0f} seconds ({cpu_seconds:.0f} processor
  seconds), {parameters:,} parameters, stored in half precision.

| pictures | PSNR | digit read right | before encoding |
|---|---|---|---|
| held out | {test_psnr:.2f} dB | {test_read:.1%} | {test_real:.1%} |
| combinations never shown | {unseen_psnr:.2f} dB | {unseen_read:.1%} | {unseen_real:.1%} |

PSNR is of the mean squared error over 5,000 pictures; digits are read by `train_judge({data!r})`,
which never sees held-out handwriting or reconstructions in training. Licence: Apache 2.0. The
digits are handwriting from public research data sets; the model is for learning, and knows nothing
but digits.
"""


class RandomColoursCB(Callback):
    """Stretches, flips and moves the channels of a `share` of the training pictures at random.

    x becomes a*x + b for each channel, |a| from `low` to `high` and |b| <= 1 - |a|, and ink and
    paper move with it: colours between and around those of the data, but never a named one exactly
    (|a| < 1). So the VAE can't get by with a place for each pair of colours that it has seen.
    """
    order = -70

    def __init__(self, share=0.4, low=0.5, high=0.95):
        if not 0 <= share <= 1 or not 0 < low <= high < 1:
            raise ValueError("expected a share from 0 to 1 and 0 < low <= high < 1, but got "
                             f"share={share}, low={low}, high={high}")
        self.share, self.low, self.high = share, low, high

    def before_batch(self, learn):
        if not learn.training:
            return
        x, *rest = learn.batch
        u = torch.rand(4, *x.shape[:2], 1, 1, device=x.device)
        size = self.low + (self.high - self.low)*u[0]
        a, b = torch.where(u[1] < 0.5, -size, size), (2*u[2] - 1)*(1 - size)
        learn.batch = torch.where(u[3][:, :1] < self.share, a*x + b, x), *rest


class Clock(Callback):
    "Seconds on the wall and of the processor, over all sittings of a fit."
    order = 900

    def __init__(self): self.wall = self.cpu = 0.

    def before_fit(self, learn): self.start = time.perf_counter(), time.process_time()

    def stop(self):
        now = time.perf_counter(), time.process_time()
        self.wall += now[0] - self.start[0]
        self.cpu += now[1] - self.start[1]
        self.start = now

    def cleanup_fit(self, learn): self.stop()

    def state_dict(self, learn):
        self.stop()
        return dict(wall=self.wall, cpu=self.cpu)

    def load_state_dict(self, learn, state): self.wall, self.cpu = state['wall'], state['cpu']


@torch.no_grad()
def figures_of(vae, pictures, judge) -> dict:
    "Returns held-out figures of a VAE on `captioned_digits`, by name."
    out, device = {}, vae.decoder[0].weight.device
    for name in ('test', 'unseen'):
        x, wanted = pictures[name].x[:], pictures[name].attributes
        back = [to_cpu(vae.decode(vae.encode(o.to(device)))) for o in x.split(500)]
        back = torch.cat(back)
        out[f'{name}_psnr'] = psnr(back, x)
        out[f'{name}_read'] = judge.score(back, wanted)['label']
        out[f'{name}_real'] = judge.score(x, wanted)['label']
    return out


def make_learner(x, folder, seconds, steps, seed, device):
    "Returns a learner of pictures `x` that resumes from `folder`, and its clock."
    set_seed(seed)
    rows = torch.arange(len(x), device=device)
    batches = RandomBatches(x.to(device), rows, BATCH_SIZE, STEPS_PER_EPOCH,
                            torch.Generator().manual_seed(seed))
    clock = Clock()
    cbs = [ProgressCB(plot=False), RandomColoursCB(), clock]
    if fast_bf16(device):
        cbs.append(MixedPrecisionCB())
    if not steps:
        cbs.append(TimeBudgetCB(seconds))
    cbs.append(CheckpointCB(folder, resume=True))
    learn = autoencoder_learner(VAE(), DataLoaders(batches), VAELoss(), lr=5e-3, ema_decay=0.999,
                                cbs=cbs, device=device, opt_func=Muon)
    return learn, clock


def train_vae(seconds=240., steps=None, data='digits', out='vae', seed=0, device=None) -> dict:
    """Trains the VAE from nothing and writes weights, config and card to `out`; returns figures.

    For `seconds`, or for `steps` (rounded up to hundreds). `data` is the handwriting, as for
    `load_images`. Interrupted, the same command carries on.
    """
    results = Results(out, ['model.safetensors', 'config.json', 'README.md'])
    device = pick_device(device)
    results.reserve(20_000_000)
    source = None if data == 'digits' else data
    print('drawing the pictures ...', flush=True)
    pictures = captioned_digits(source)
    kept = Path(out)/f"checkpoint-{Path(data).name}-{seed}{f'-{steps}' if steps else ''}"
    learn, clock = make_learner(pictures['train'].x, kept, seconds, steps, seed, device)
    if kept.is_dir() and checkpoints(kept):
        print(f'carrying on (to begin anew, remove {kept})', flush=True)
    try:
        learn.fit(-(-steps//STEPS_PER_EPOCH) if steps else 10**9, valid=False)
    except KeyboardInterrupt:
        print('\nInterrupted: the same command carries on.', flush=True)
        raise
    # as it's stored
    vae = copy.deepcopy(learn.ema.model).half().float().calibrate(pictures['train'].x[:5000])
    print(f'{learn.n_steps:,} steps; now the judge reads what comes back ...', flush=True)
    figures = figures_of(vae, pictures, train_judge(source, device=device))
    long = f'--steps {steps}' if steps else f'--seconds {seconds:g}'
    figures |= dict(
        data=data, n_train=len(pictures['train']), steps=learn.n_steps, batch_size=BATCH_SIZE,
        seconds=clock.wall, cpu_seconds=clock.cpu, seed=seed, share=RandomColoursCB().share,
        parameters=sum(p.numel() for p in vae.parameters()),
        command=f"miniai train vae --data {data} --seed {seed} {long}")
    write(results, vae, figures, kept)
    return figures


def write(results, vae, figures, kept):
    "Writes weights and card, says how good they are, and removes the checkpoints."
    with results as new:
        copy.deepcopy(vae).half().save_pretrained(new)
        (new/'README.md').write_text(CARD.format(**figures))
    for path in checkpoints(kept):
        path.unlink()
    if not any(kept.iterdir()):
        kept.rmdir()
    for name, words in (('test', 'held out'), ('unseen', 'unseen combinations')):
        f = {k.removeprefix(f'{name}_'): v for k, v in figures.items()}
        print(f"{words:20} {f['psnr']:.2f} dB, digit read right {f['read']:.1%} (before encoding "
              f"{f['real']:.1%})")
    print(f'Written to {results.folder}: config.json, model.safetensors, README.md')
