"""A word of one's own: what changes in a pipeline and what doesn't, files, and bad input."""
import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from miniai import cli
from miniai.autoencoder import VAE
from miniai.clip import CLIP
from miniai.finetune import DreamBooth, TextualInversion, add_token, fingerprint, load_token
from miniai.pipeline import TextToImagePipeline
from miniai.tensors import set_seed
from miniai.text_to_image import TextUNet

X, SAID = torch.rand(3, 3, 32, 32)*2 - 1, ['an orange seven', 'orange', 'a five on orange paper']
FIT = dict(steps=2, batch_size=4, device='cpu')


def untrained(seed):
    set_seed(seed)
    pipe = TextToImagePipeline(VAE(widths=(8, 16), n_blocks=(1, 1)), CLIP(), TextUNet(width=32))
    for last in (pipe.unet.out[2], *(cross.out for cross in pipe.unet.cross)):
        nn.init.normal_(last.weight, std=0.1)                        # these begin at 0
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope='module')
def pipe(): return untrained(0)


def weights(pipe):
    return {f'{name}.{k}': v.clone() for name in ('vae', 'clip', 'unet')
            for k, v in getattr(pipe, name).state_dict().items()}


def draw(pipe, prompt):
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=2, generator=generator, output_type='pt').images


def changed(before, after): return [k for k in before if not torch.equal(before[k], after[k])]


def test_one_more_word_and_the_others_as_before(pipe):
    before, words = weights(pipe), pipe.clip.tokenizer.words
    new = add_token(pipe, 'orange', torch.randn(96))
    assert new.clip.tokenizer.words == (*words, 'orange') and pipe.clip.tokenizer.words == words
    assert torch.equal(draw(new, 'a red seven'), draw(pipe, 'a red seven'))
    assert not changed(before, weights(pipe))
    two = add_token(new, 'arrow', torch.randn(96))
    assert torch.equal(draw(two, 'an orange seven'), draw(new, 'an orange seven'))
    assert not torch.equal(draw(two, 'an orange arrow'), draw(two, 'an orange seven'))


def test_inversion_changes_one_row_and_nothing_else(pipe):
    original = weights(pipe)
    ti = TextualInversion(pipe, 'orange', like='coloured')
    before = weights(ti.pipe)
    assert torch.equal(draw(ti.pipe, 'orange'), draw(pipe, 'coloured'))        # begins as this
    for _ in range(2):                                                         # and carries on
        ti.learner(X, SAID, **FIT).fit(1, valid=False)
    after = weights(ti.pipe)
    assert changed(before, after) == ['clip.text.embedding.weight']
    a, b = before['clip.text.embedding.weight'], after['clip.text.embedding.weight']
    assert torch.equal(a[:-1], b[:-1]) and not torch.equal(a[-1], b[-1])
    assert not changed(original, weights(pipe))


def test_dreambooth_trains_its_own_unet(pipe):
    original, gen = weights(pipe), torch.Generator().manual_seed(1)
    booth = DreamBooth(pipe, 'orange', generator=gen)
    before = weights(booth.pipe)
    learn = booth.learner(X, SAID, ['a red seven', 'a five']*2, **FIT, generator=gen)
    assert len(learn.dls.train.x) == 3*5 + 4                         # four fifths are new
    learn.fit(1, valid=False)
    names = changed(before, weights(booth.pipe))
    assert names and all(name.startswith('unet.') for name in names)
    assert not changed(original, weights(pipe))
    once = draw(booth.pipe, 'orange')
    booth.learner(X, SAID, **FIT).fit(1, valid=False)
    assert not torch.equal(draw(booth.pipe, 'orange'), once)


def test_a_whole_pipeline_keeps_its_new_word(pipe, tmp_path):
    new = DreamBooth(pipe, 'arrow').pipe
    new.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, 'a red arrow'), draw(new, 'a red arrow'))


@pytest.fixture(scope='module')
def files(pipe, tmp_path_factory):
    top = tmp_path_factory.mktemp('tokens')
    pipe.save_pretrained(top/'model')
    for token in ('orange', 'arrow'):
        TextualInversion(pipe, token, 'red').save(top/f'{token}.safetensors')
    row, encoder = torch.zeros(96), fingerprint(pipe.clip)
    for name, told in dict(elsewhere=dict(token='pink', encoder='0'), untold=None,
                           known=dict(token='red', encoder=encoder)).items():
        save_file({'embedding': row}, top/f'{name}.safetensors', told)
    told = dict(token='pink', encoder=encoder)
    save_file({'embedding': row/0}, top/'nan.safetensors', told)
    save_file({'embedding': row[:5]}, top/'short.safetensors', told)
    save_file({'other': row}, top/'other.safetensors', told)
    (top/'text.safetensors').write_text('orange')
    return top


def test_tokens_as_files(pipe, files):
    new = load_token(load_token(pipe, files/'orange.safetensors'), files/'arrow.safetensors')
    assert new.clip.tokenizer.words[-2:] == ('orange', 'arrow')
    assert torch.equal(draw(new, 'an orange seven'), draw(pipe, 'a red seven'))
    assert (files/'orange.safetensors').stat().st_size < 1_000


BAD_FILES = {
    'nowhere': (FileNotFoundError, 'no token file'), 'text': (ValueError, 'no token file'),
    'untold': (ValueError, 'no token file'), 'other': (ValueError, 'no token file'),
    'elsewhere': (ValueError, "'pink'.*another text encoder"),
    'short': (ValueError, 'another text encoder'),
    'known': (ValueError, "'red' is known already"), 'nan': (ValueError, 'NaN'),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_bad_token_files(pipe, files, name):
    kind, words = BAD_FILES[name]
    with pytest.raises(kind, match=words):
        load_token(pipe, files/f'{name}.safetensors')


def test_a_token_is_for_its_own_text_encoder(pipe, files):
    assert fingerprint(copy.deepcopy(pipe).clip) == fingerprint(pipe.clip)
    with pytest.raises(ValueError, match='another text encoder'):
        load_token(untrained(1), files/'orange.safetensors')


@pytest.mark.parametrize('token,words', {
    'red': 'known already', 'crimson': 'known already', '7': 'known already', 'the': 'known',
    'two words': 'one plain word', '': 'one plain word', 'Orange': 'lower case', 'a-b': 'plain',
    None: 'one plain word',
}.items())
def test_words_that_can_not_be_new(pipe, token, words):
    for make in (DreamBooth, TextualInversion):
        with pytest.raises(ValueError, match=words):
            make(pipe, token)


@pytest.mark.parametrize('make,args,words', [
    (TextualInversion, dict(x=X[:2], captions=SAID), '2 pictures and 3 captions'),
    (DreamBooth, dict(x=X[:0], captions=[]), '0 pictures'),
    (DreamBooth, dict(x=X, captions=[*SAID[:2], 'a five']), "1 captions without 'orange'"),
    (TextualInversion, dict(x=X, captions=[*SAID[:2], 'orange mauve']), 'unknown words: mauve'),
    (TextualInversion, dict(x=X*2, captions=SAID), 'must be in'),
    (DreamBooth, dict(x=X, captions=SAID, prior=['a mauve five']), 'unknown words: mauve'),
    (DreamBooth, dict(x=X, captions=SAID, prior_share=1.), 'prior_share'),
])
def test_bad_pictures_and_captions(pipe, make, args, words):
    with pytest.raises(ValueError, match=words):
        make(pipe, 'orange').learner(**args, device='cpu')


def test_inversion_begins_as_a_known_word(pipe):
    for like in ('mauve', 'the', ''):
        with pytest.raises(ValueError):
            TextualInversion(pipe, 'orange', like)


def test_generate_takes_tokens_by_file(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ['generate', '--model', str(files/'model'), '--steps', '2', 'an orange arrow']
    tokens = [['--token', str(files/f'{t}.safetensors')] for t in ('orange', 'arrow', 'elsewhere')]
    assert cli.main(words + tokens[0] + tokens[1]) == 0 and (tmp_path/'generated.png').is_file()
    (tmp_path/'generated.png').unlink()
    for more, said in ((tokens[0], 'unknown words: arrow'), (tokens[2], 'another text encoder'),
                       (tokens[0]*2, 'known already'), (['--token', 'x'], 'no token file')):
        assert cli.main(words + more) == 2
        assert said in capsys.readouterr().err and not (tmp_path/'generated.png').exists()
