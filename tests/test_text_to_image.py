"""Text to image: cross-attention against PyTorch's, what a batch becomes, what training does."""
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from miniai.clip import CLIP, CaptionedBatches
from miniai.data import DataLoaders
from miniai.diffusion import sample
from miniai.guidance import Guidance
from miniai.schedulers import DDPMScheduler
from miniai.tensors import set_seed
from miniai.text_to_image import (
    CrossAttention,
    TextDiffusionCB,
    TextUNet,
    default_scheduler,
    text_to_image_learner,
)


@pytest.fixture
def words():
    "States of 7 words for each of 3 pictures; the second caption has 2, the third 1."
    set_seed(0)
    words = torch.randn(3, 7, 12)
    words[1, 2:] = words[2, 1:] = 0
    return words


@pytest.fixture(scope='module')
def clip():
    set_seed(0)
    return CLIP(width=16, n_layers=1, dim=8, widths=(8, 16)).eval()


def woken(model):
    "The model, layers that start at 0 included, at random."
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.2)
    return model


def small(**kw):
    return TextUNet(**dict(width=16, n_blocks=3, context_dim=16, n_heads=2, emb_dim=16) | kw)


@pytest.mark.parametrize('n_heads', [1, 2, 4])
def test_cross_attention_is_pytorchs(words, n_heads):
    ours, x = woken(CrossAttention(16, 12, n_heads)), torch.randn(3, 16, 4, 2)
    theirs = nn.MultiheadAttention(16, n_heads, kdim=12, vdim=12, batch_first=True)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(ours.q.weight)
        theirs.k_proj_weight.copy_(ours.k.weight)
        theirs.v_proj_weight.copy_(ours.v.weight)
        theirs.in_proj_bias.zero_()[:16] = ours.q.bias
        theirs.out_proj.load_state_dict(ours.out.state_dict())
        places = ours.norm(x).flatten(2).mT
        said, weights = theirs(places, words, words, key_padding_mask=~words.any(2),
                               average_attn_weights=False)
        torch.testing.assert_close(ours.weights(x, words), weights, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours(x, words), x + said.mT.view_as(x), atol=1e-5, rtol=1e-4)


def test_the_words_change_nothing_at_first_and_padding_never(words):
    x, t = torch.randn(3, 4, 4, 4), torch.tensor([0, 500, 999])
    net = small(context_dim=12)
    assert not net(x, t, words).any()
    assert torch.equal(CrossAttention(4, 12, 2)(x, words), x)
    woken(net)
    longer = torch.cat([words, torch.zeros(3, 5, 12)], 1)
    torch.testing.assert_close(net(x, t, longer), net(x, t, words), atol=1e-5, rtol=1e-4)
    alone = net(x[1:2], t[1:2], words[1:2, :2])
    torch.testing.assert_close(net(x, t, words)[1:2], alone, atol=1e-5, rtol=1e-4)
    assert (net(x, t, words.flip(0)) - net(x, t, words)).abs().max() > 1e-3
    # of a caption without any word, nothing is heard
    nothing = CrossAttention(4, 12, 2)(x, 0*words)
    assert nothing.isfinite().all()


def test_weights_are_shares_of_the_words(words):
    w = CrossAttention(16, 12, 4).weights(torch.randn(3, 16, 4, 4), words)
    assert w.shape == (3, 4, 16, 7)
    torch.testing.assert_close(w.sum(3), torch.ones(3, 4, 16))
    assert not w[1, ..., 2:].any() and not w[2, ..., 1:].any()


@pytest.mark.parametrize('x, words', [((2, 3, 4, 4), (2, 7, 16)), ((2, 4, 4, 4), (1, 7, 16)),
                                      ((2, 4, 4, 4), (2, 7, 12)), ((2, 4, 4, 4), (2, 16))])
def test_other_shapes_are_refused(x, words):
    with pytest.raises(ValueError, match=r'expected latents \(n, 4, h, w\), words \(n, tokens, 16'):
        small()(torch.zeros(x), torch.zeros(2), torch.zeros(words))


@pytest.mark.parametrize('drop', [-0.1, 1.5, float('nan'), 'all'])
def test_other_shares_are_refused(clip, drop):
    with pytest.raises((ValueError, TypeError), match='drop'):
        TextDiffusionCB(default_scheduler(), clip, drop)


def batch_of(clip, scheduler, n=2000, drop=0.1, training=True):
    captions = ['a red seven', 'thick green three on blue paper'] * (n // 2)
    z, ids = torch.randn(n, 4, 2, 2), clip.ids(captions)[:, :8]
    learn = SimpleNamespace(batch=((z, ids), None), training=training, i=0)
    TextDiffusionCB(scheduler, clip, drop).before_batch(learn)
    return z, ids, *learn.batch


@pytest.mark.parametrize('kind', ['v_prediction', 'epsilon', 'sample'])
def test_a_batch_gets_noise_and_the_schedulers_target(clip, kind):
    set_seed(0)
    scheduler = DDPMScheduler(prediction_type=kind, beta_schedule='squaredcos_cap_v2')
    z, ids, (x, t, words), target = batch_of(clip, scheduler, n=100, drop=0.)
    left = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    noise = (x - left.sqrt() * z) / (1 - left).sqrt()
    torch.testing.assert_close(target, scheduler.target(z, noise, t), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(words, clip.states(ids))
    assert not words.requires_grad


@pytest.mark.parametrize('drop, training, low, high', [
    (0.1, True, 0.06, 0.14), (0.5, True, 0.44, 0.56), (1.0, True, 1, 1), (0.0, True, 0, 0),
    (0.5, False, 0, 0)])
def test_the_right_share_of_captions_is_left_empty(clip, drop, training, low, high):
    set_seed(0)
    z, ids, (x, t, words), _ = batch_of(clip, default_scheduler(), drop=drop, training=training)
    full, empty = clip.states(ids), clip.states([''])[:, :8]
    hidden = (words == empty).flatten(1).all(1)
    assert low <= hidden.float().mean() <= high
    assert torch.equal(words[~hidden], full[~hidden])


def test_a_short_training_lowers_the_loss_on_held_out_data(clip):
    def data(n_batches, seed):
        # two kinds of latents, told apart by their captions
        g = torch.Generator().manual_seed(seed)
        kind = torch.randint(2, (256,), generator=g)
        z = (2.0 * kind - 1).view(-1, 1, 1, 1) + 0.1 * torch.randn(256, 4, 2, 2, generator=g)
        names = [['red seven', 'green on blue'][k] for k in kind.tolist()]
        return CaptionedBatches(z, names, clip.tokenizer, 32, n_batches, g)

    set_seed(0)
    unet, losses = small(), []
    before = copy.deepcopy(clip.state_dict())
    learn = text_to_image_learner(unet, clip, DataLoaders(data(60, 0), data(8, 1)), ema_decay=0.9,
                                  device='cpu')
    noise = next(cb for cb in learn.cbs if isinstance(cb, TextDiffusionCB))

    @torch.no_grad()
    def held_out():
        set_seed(1)
        learn.training, total = False, 0.0
        for learn.i, learn.batch in enumerate(data(8, 1)):
            noise.before_batch(learn)
            inputs, target = learn.batch
            total += nn.functional.mse_loss(unet(*inputs), target).item()
        return total / 8

    losses.append(held_out())
    learn.fit(2, valid=False)
    losses.append(held_out())
    print(losses)
    assert losses[1] < 0.7 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in clip.state_dict().items())
    # and it draws the kind that it's asked for
    prompts = ['red seven', 'green on blue'] * 8
    guided = Guidance(learn.ema.model, clip.states(prompts), clip.states(['']), 2.0)
    z = sample(guided, default_scheduler(), (16, 4, 2, 2), 8, torch.Generator().manual_seed(0))
    mean = z.mean((1, 2, 3))
    print(mean)
    assert (mean[1::2].mean() - mean[::2].mean()) > 0.7


def test_saved_loaded_and_copied_it_answers_the_same(tmp_path, words):
    net = woken(small(context_dim=12, sample_size=8)).eval()
    net.save_pretrained(tmp_path)
    args = torch.randn(3, 4, 4, 4), torch.tensor([1, 20, 900]), words
    loaded, copied = TextUNet.from_pretrained(tmp_path), copy.deepcopy(net)
    assert loaded.sample_size == 8
    for other in (loaded, copied):
        assert torch.equal(other(*args), net(*args))


def test_the_default_scheduler_starts_from_pure_noise_and_is_what_training_uses(clip):
    scheduler = default_scheduler()
    scheduler.set_timesteps(16)
    assert scheduler.timesteps[0] == 999 and scheduler.config['prediction_type'] == 'v_prediction'
    learn = text_to_image_learner(small(), clip, DataLoaders([]), device='cpu')
    noise = next(cb for cb in learn.cbs if isinstance(cb, TextDiffusionCB))
    assert dict(noise.scheduler.config) == dict(scheduler.config) and noise.drop == 0.1
