"""CLIP: words, captions, attention, the loss, batches, training, saving, and what's refused."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from miniai import clip as C
from miniai.captions import ATTRIBUTES, LEAN, TEMPLATES, captioned_digits, digit_caption
from miniai.checkpoint import CheckpointCB
from miniai.learner import Callback

SMALL = dict(width=16, n_layers=1, dim=8, widths=(8, 8))


@pytest.fixture(scope='module')
def digits():
    return captioned_digits(n_train=1_500, n_test=256)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return C.CLIP(**SMALL)


# words


@pytest.mark.parametrize(
    'text,words',
    [
        ('A RED seven!', 'red seven'),
        ('the 7, bold; purple', 'seven thick magenta'),
        ('slanted to the left', 'leaning left'),
        ('standing upright', 'upright'),
        ('', ''),
        ('...', ''),
    ],
)
def test_words_of_a_caption(text, words):
    assert C.Tokenizer(C.WORDS).split(text) == words.split()


def test_ids_have_an_end_and_padding():
    tokenizer = C.Tokenizer(['red', 'seven'], length=4)
    ids = tokenizer(['red seven', 'Seven', ''])
    assert ids.tolist() == [[2, 3, 1, 0], [3, 1, 0, 0], [1, 0, 0, 0]] and ids.dtype == torch.long
    assert tokenizer('red').shape == (1, 4) and tokenizer([]).shape == (0, 4)
    assert len(tokenizer) == 4


def test_every_template_of_the_captions_is_known():
    tokenizer = C.Tokenizer(C.WORDS)
    for t in range(len(TEMPLATES)):
        for k in range(8):
            tokenizer(digit_caption(k, k, (k + 1) % 8, k % 3, k % 3, t))
    assert tokenizer.split(LEAN['upright']) == ['upright']
    assert set(C.SYNONYMS.values()) <= {*C.WORDS, ''} and not set(C.SYNONYMS) & set(C.WORDS)


def test_own_words():
    texts = ['a dog in the snow', 'two cats asleep on a sofa']
    tokenizer = C.Tokenizer.from_texts(texts)
    assert set(tokenizer.words) == set('dog in snow two cats asleep on sofa'.split())
    assert tokenizer.length == 6 and tokenizer(texts).shape == (2, 6)
    assert 'the' in C.Tokenizer.from_texts(texts, synonyms={}).words
    # a known word is itself, whatever it's a synonym of elsewhere
    assert C.Tokenizer(['purple', 'magenta']).split('purple') == ['purple']


REFUSED_TEXTS = [
    ('a rde sevn', ValueError, 'unknown words: rde, sevn .nearest: red or .*seven'),
    (['red', 'a cat', 'a dog'], ValueError, 'cat, dog'),
    ('größe', ValueError, 'größe'),
    ('red ' * 20, ValueError, 'over 19 words'),
    ([1, 2], TypeError, 'int found'),
    (None, TypeError, 'not iterable'),
    (['red', None], TypeError, 'NoneType found'),
]


@pytest.mark.parametrize('texts,error,words', REFUSED_TEXTS, ids=lambda o: str(o)[:20])
def test_refused_captions(texts, error, words, model):
    with pytest.raises(error, match=words):
        C.Tokenizer(C.WORDS)(texts)
    with pytest.raises(error, match=words):
        model.encode_text(texts)


@pytest.mark.parametrize('words', [[], ['red', 'red']])
def test_refused_vocabulary(words):
    with pytest.raises(ValueError, match='each once'):
        C.Tokenizer(words)


@pytest.mark.parametrize('length', [0, 1.5, True])
def test_refused_length(length):
    with pytest.raises(ValueError, match='length'):
        C.Tokenizer(['red'], length)


# captions in free wording


def test_describe_says_what_is_there_and_nothing_else():
    rng, tokenizer = random.Random(0), C.Tokenizer(C.WORDS)
    colours = ATTRIBUTES['ink']
    for _ in range(500):
        row = [rng.randrange(10), *rng.sample(range(8), 2), rng.randrange(3), rng.randrange(3)]
        said = C.mention(row, rng)
        assert any(v >= 0 for v in said) and all(v in (-1, w) for v, w in zip(said, row))
        words = tokenizer.split(C.describe(said, rng))
        for k, name in enumerate(ATTRIBUTES):
            kinds = colours if name in ('ink', 'paper') else ATTRIBUTES[name]
            assert said[k] < 0 or kinds[said[k]] in words
        assert sum(w in colours for w in words) == (said[1] >= 0) + (said[2] >= 0)
        assert sum(w in ATTRIBUTES['label'] for w in words) == (said[0] >= 0)


def test_describe_is_one_for_a_seed_and_many_for_many():
    row = [7, 2, 5, 0, 1]
    assert C.describe(row, random.Random(3)) == C.describe(row, random.Random(3))
    assert len({C.describe(row, random.Random(k)) for k in range(100)}) > 50
    assert C.describe([-1] * 5, random.Random(0)).split()[-1] in ('digit', 'number')


# attention


def test_nearness_by_its_definition():
    b = C.nearness(6, (2.0, 0.5))
    for h, (slope, side) in enumerate([(2, -1), (2, 1), (0.5, -1), (0.5, 1)]):
        for i in range(6):
            for j in range(6):
                want = -slope * abs(i - j) if side * (j - i) >= 0 else C.HIDDEN
                assert b[h, i, j] == want


def test_block_agrees_with_torch():
    torch.manual_seed(0)
    block = C.TextBlock(16, 4)
    oracle = nn.MultiheadAttention(16, 4, batch_first=True)
    oracle.load_state_dict(
        {
            'in_proj_weight': block.qkv.weight,
            'in_proj_bias': block.qkv.bias,
            'out_proj.weight': block.out.weight,
            'out_proj.bias': block.out.bias,
        }
    )
    x, bias = torch.randn(3, 7, 16), C.nearness(7, (2.0, 0.5))
    y = block.norm1(x)
    want = x + oracle(y, y, y, attn_mask=bias.repeat(3, 1, 1))[0]
    want = want + block.mlp(block.norm2(want))
    assert torch.allclose(block(x, bias), want, atol=1e-4)


def test_padding_changes_nothing(model):
    texts = ['a red seven', 'a thick green one on yellow paper leaning left', '']
    together = model.states(texts)
    for text, states in zip(texts, together):
        n = len(model.tokenizer.split(text)) + 1
        alone = model.states(model.tokenizer(text)[:, :n])[0]
        assert torch.allclose(states[:n], alone, atol=1e-5)
        assert not states[n:].any() and states[:n].any(1).all()
        assert torch.allclose(
            model.encode_text(text), model.encode_text(texts)[texts.index(text)], atol=1e-5
        )


def test_order_matters(model):
    a, b = model.encode_text(['red seven on green', 'green seven on red'])
    assert (a - b).abs().max() > 1e-3


# the model


def test_embeddings_scores_and_logits(model, digits):
    x, texts = digits['test'].x[:6], digits['test'].captions[:6]
    image, text = model.encode_image(x), model.encode_text(texts)
    assert image.shape == text.shape == (6, 8) and model.states(texts).shape == (6, 20, 16)
    for e in (image, text):
        assert torch.allclose(e.norm(dim=1), torch.ones(6), atol=1e-4)
    assert torch.allclose(model.score(x, texts), (image * text).sum(1), atol=1e-5)
    assert model.score(x, 'a red seven').shape == (6,)
    assert torch.allclose(model(x, texts), 14 * image @ text.T, atol=1e-3)
    assert torch.equal(model.encode_text(texts), model.encode_text(model.tokenizer(texts)))
    with torch.no_grad():
        model.logit_scale.fill_(99.0)
    assert torch.allclose(model(x, texts), 100 * image @ text.T, atol=1e-2)


@pytest.mark.parametrize(
    'ids',
    [
        torch.tensor([2, 3]),
        torch.tensor([[2, 99]]),
        torch.tensor([[-1, 2]]),
        torch.tensor([[2.0, 3.0]]),
        torch.zeros(1, 2, 3, dtype=torch.long),
    ],
)
def test_refused_ids(ids, model):
    with pytest.raises(ValueError, match='ids .n, length. below'):
        model.states(ids)


@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 1, 32, 32), (1, 3, 28, 28), (1, 3, 32, 32, 1)])
def test_refused_pictures(shape, model):
    with pytest.raises(ValueError, match='n, 3, 32, 32'):
        model.encode_image(torch.zeros(shape))


def test_saved_and_loaded_to_the_last_bit(tmp_path, digits):
    torch.manual_seed(0)
    model = C.CLIP(['blue', 'four'], length=5, slopes=(3.0,), **SMALL)
    model.save_pretrained(tmp_path)
    again = C.CLIP.from_pretrained(tmp_path)
    texts, x = ['blue four', ''], digits['test'].x[:2]
    assert again.tokenizer.words == ('blue', 'four') and again.tokenizer.length == 5
    with torch.no_grad():
        assert torch.equal(again(x, texts), model(x, texts))


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing-here'):
        C.CLIP.from_pretrained(tmp_path / 'nothing-here')


# the loss


def test_loss_both_ways_without_those_also_true():
    torch.manual_seed(0)
    s, true = torch.randn(5, 5), torch.rand(5, 5) < 0.3
    want = 0.0
    for i in range(5):
        row = [j for j in range(5) if j == i or not true[i, j]]
        column = [j for j in range(5) if j == i or not true[j, i]]
        want += s[i, row].logsumexp(0) - s[i, i] + s[column, i].logsumexp(0) - s[i, i]
    assert torch.allclose(C.clip_loss(s, true), want / 10, atol=1e-5)
    own = torch.eye(5, dtype=torch.bool)
    both = (F.cross_entropy(s, torch.arange(5)) + F.cross_entropy(s.T, torch.arange(5))) / 2
    assert torch.allclose(C.clip_loss(s, own), both, atol=1e-5)


# batches


def test_random_colours(digits):
    d = digits['train'].x
    x, y = C.random_colours(d, 600, torch.Generator().manual_seed(0))
    again = C.random_colours(d, 600, torch.Generator().manual_seed(0))
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert x.shape == (600, 3, 32, 32) and x.abs().max() <= 1 and (y[:, [0, 3, 4]] >= 0).all()
    unsaid = y[:, 1:3] == 8
    assert unsaid.any(1).all()
    for kind in ([True, True], [True, False], [False, True]):
        assert 0.25 < (unsaid == torch.tensor(kind)).all(1).float().mean() < 0.42
    assert (x.flatten(2).amax(2) - x.flatten(2).amin(2)).amax(1).min() > 0.3  # ink that shows
    named = y[:, 2] < 8
    assert torch.allclose(x[named, :, 0, 0], C.PALETTE[y[named, 2]], atol=1e-5)


def batches(digits, **kwargs):
    train = digits['train']
    kwargs = dict(batch_size=64, n_batches=2, generator=torch.Generator().manual_seed(0)) | kwargs
    return C.CaptionedBatches(train.x, train.attributes, C.Tokenizer(C.WORDS), **kwargs)


def test_batches_are_the_same_for_a_seed(digits):
    for (a, true_a), (b, true_b) in zip(batches(digits), batches(digits)):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and torch.equal(true_a, true_b)


def test_also_true_is_what_the_words_say(digits):
    "Full captions are true of equal attributes alone; what says less is true of more."
    (x, ids), full = next(iter(batches(digits, full=1.0)))
    (x, ids), less = next(iter(batches(digits, full=0.0, p=0.1)))
    assert full.diagonal().all() and less.diagonal().all() and less.sum() > 4 * full.sum()
    tokenizer, words = C.Tokenizer(C.WORDS), []
    for row in ids.tolist():
        words.append({tokenizer.words[k - 2] for k in row if k > 1})
    digit = set(ATTRIBUTES['label'])
    for i in range(64):
        for j in range(64):
            if less[i, j] and words[i] & digit and words[j] & digit:
                assert words[i] & digit == words[j] & digit


def test_batches_of_own_captions_and_any_pictures():
    texts = ['red one', 'Red ONE!', 'blue two']
    latents = torch.arange(3.0).view(3, 1)
    tokenizer = C.Tokenizer.from_texts(texts)
    (z, ids), true = next(iter(C.CaptionedBatches(latents, texts, tokenizer, 32, 1)))
    same = (z < 2) == (z < 2).T
    assert torch.equal(true, same) and ids.shape == (32, 3)


@pytest.mark.parametrize(
    'change,words',
    [
        (dict(attributes=torch.zeros(1500, 4).long()), 'attributes'),
        (dict(attributes=torch.zeros(3, 5).long()), '1500 pictures'),
        (dict(x=torch.zeros(1500, 3, 32, 32), random_share=0.5), 'Drawings'),
        (dict(batch_size=0), 'batch_size'),
    ],
)
def test_refused_batches(change, words, digits):
    x, y = digits['train'].x, digits['train'].attributes
    x, y = change.pop('x', x), change.pop('attributes', y)
    with pytest.raises(ValueError, match=words):
        C.CaptionedBatches(x, y, C.Tokenizer(C.WORDS), **change)


# training


def test_a_short_training_finds_captions(digits):
    learn = C.train_clip(digits['train'], 60, 64, lr=4e-3, seed=1, device='cpu')
    losses = [row['train_loss'] for row in learn.history]
    assert len(losses) == 6 and losses[-1] < 0.85 * losses[0]
    test = digits['test']
    rng = random.Random(0)
    texts = [C.describe(row, rng) for row in test.attributes.tolist()]
    found = C.retrieval(learn.model, test.x, texts, n=64, attributes=test.attributes)
    assert min(found) > 5 / 64


def test_training_is_the_same_for_a_seed(digits):
    a, b = (
        C.train_clip(digits['train'], 3, 16, seed=5, device='cpu').model.state_dict()
        for _ in range(2)
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_training_on_own_captions():
    torch.manual_seed(0)
    x, texts = torch.rand(40, 3, 32, 32) * 2 - 1, ['a dark one', 'a light one'] * 20
    x[::2] -= 0.9
    tokenizer = C.Tokenizer.from_texts(texts)
    model = C.CLIP(tokenizer.words, length=tokenizer.length, **SMALL)
    x = x.clamp(-1, 1)
    C.train_clip((x, texts), 40, 16, 1e-2, random_share=0, model=model, device='cpu')
    assert min(C.retrieval(model, x, texts, n=40)) > 0.9


class Interrupt(Callback):
    order = 2000

    def before_step(self, learn):
        if learn.n_steps == 70:
            raise KeyboardInterrupt


def test_interrupted_training_carries_on_to_the_same_weights(digits, tmp_path):
    def train(folder, *cbs):
        torch.manual_seed(0)
        model = C.CLIP(**SMALL)
        cbs = [CheckpointCB(tmp_path / folder, resume=True), *cbs]
        return C.train_clip(digits['train'], 100, 16, cbs=cbs, model=model, device='cpu')

    whole = train('whole').model.state_dict()
    with pytest.raises(KeyboardInterrupt):
        train('halves', Interrupt())
    halves = train('halves').model.state_dict()
    assert all(torch.equal(whole[k], halves[k]) for k in whole)


@pytest.mark.parametrize('steps', [0, 2.5, -1])
def test_refused_steps(steps, digits):
    with pytest.raises(ValueError, match='steps'):
        C.train_clip(digits['train'], steps)


def test_retrieval_counts_what_is_right(digits):
    "A model that knows all, by its attributes."

    class Knows(nn.Module):
        def ids(self, captions):
            return captions

        def forward(self, x, ids):
            return (x[:, None] == ids).all(-1).float()

    rows = torch.arange(8)[:, None]
    assert C.retrieval(Knows(), rows, rows, n=4) == (1.0, 1.0)
    assert C.retrieval(Knows(), rows, rows.roll(1, 0), n=8) == (0.0, 0.0)
    with pytest.raises(ValueError, match='n is 9'):
        C.retrieval(Knows(), rows, rows, n=9)
