"Out-of-distribution scores: the hooks leave nothing behind, the score survives its bundle, and does what page 55 says."
import threading

import numpy as np
import pytest
import torch

from skin_lesions.networks import LesionNet, create_body
from skin_lesions.ood import OODScore, answer_with_score, fit_feature_distance, fit_texture_distance, keep_features, texture_layer
from skin_lesions.predict import load_predictor
from skin_lesions.synthetic import NON_LESIONS, draw_non_lesion


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return LesionNet(create_body('test_efficientnet', pretrained=False), 7).eval()


def hooks(net): return len(net.body._forward_hooks) + len(texture_layer(net.body)[0]._forward_hooks)


def test_nothing_stays_hooked_after_an_error(net):
    with pytest.raises(RuntimeError), keep_features(net): net(torch.zeros(1, 5, 32, 32))
    assert not hooks(net)


def test_blocks_within_blocks(net):
    "The inner block gets its passes, the outer one its own"
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), keep_features(net) as outer:
        net(x)
        with keep_features(net, texture=False) as inner: net(x[:1])
        net(x)
    assert [len(f) for f in outer] == [2, 2] and [f.shape for f in inner] == [(1, net.body.n_features)]
    assert not hooks(net)


def test_each_thread_gets_its_own_features(net):
    found, start = {}, threading.Barrier(8)
    def work(i):
        x = torch.full((i+1, 3, 32, 32), i/8)
        start.wait()
        for _ in range(5):
            with torch.no_grad(), keep_features(net) as kept: net(x)
            found.setdefault(i, []).append(kept)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    for i, rounds in found.items():
        assert [len(kept[0]) for kept in rounds] == [i+1]*5
        for kept in rounds: torch.testing.assert_close(kept[0], rounds[0][0])
    assert not hooks(net)


@pytest.mark.parametrize('seed', range(5))
def test_the_score_comes_back_from_its_two_parts(seed):
    rng = np.random.default_rng(seed)
    d, m, n = rng.integers(2, 40), rng.integers(2, 12), 200
    last, texture = rng.normal(size=(n, d)), rng.normal(size=(n, m))
    score = OODScore(fit_feature_distance(last), fit_texture_distance(texture), 1.5, rate=.01)
    again = OODScore.from_dict(score.as_dict(), score.tensors())
    features = np.hstack([last, texture])
    np.testing.assert_array_equal(again.score(features), score.score(features))
    assert .7 < np.sqrt((score.score(features)**2).mean()) < 1.1 # about 1 on what it was fitted on


def test_the_answer_is_that_of_the_network(net):
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad(), keep_features(net) as kept: expected = net(x).double().softmax(1)
    features = np.random.default_rng(0).normal(size=(50, kept[0].shape[1]))
    n = net.body.n_features
    score = OODScore(fit_feature_distance(features[:, :n]), fit_texture_distance(features[:, n:]))
    for s in (None, score):
        p, scores = answer_with_score(net, s, x)
        np.testing.assert_allclose(p, expected, atol=1e-6)
    np.testing.assert_allclose(scores, score.score(kept[0]))


def test_the_packaged_network_makes_no_decision_of_what_is_no_lesion():
    predictor = load_predictor('ham10000', device='cpu')
    kinds = [k for k in NON_LESIONS if k != 'skin'] # bare skin is nearest to a lesion, and passes at times
    table = predictor.predict([draw_non_lesion(k, i, size=(300, 225)) for k in kinds for i in range(4)], progress=False)
    assert table.ood.mean() > .9
    assert table.decision[table.ood].isna().all() and table.reason[table.ood].notna().all() and table.decision[~table.ood].notna().all()
