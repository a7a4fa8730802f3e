"Soups and re-trained classifiers: every kind of network, and a predictor's own images."
import numpy as np
import pytest
import torch
from torch import nn

from skin_lesions.networks import EnsembleNet, LesionNet, TwoStageNet, create_body
from skin_lesions.soup import (average_weights, classifier_inputs, image_batches, last_layers, logits_from_inputs, recalibrate_norm,
                               retrain_classifier, tau_normalize)

def body(arch='test_efficientnet'): return create_body(arch, pretrained=False)

KINDS = dict(
    one=lambda: LesionNet(body(), 7),
    one_with_patient=lambda: LesionNet(body(), 7, n_patient=5),
    shared=lambda: TwoStageNet(body(), n_out=7, first=5),
    two_bodies=lambda: TwoStageNet(body(), body(), n_out=7, first=0, n_patient=5),
    no_hidden=lambda: LesionNet(body('test_resnet'), 3, hidden=()),
    transformer=lambda: LesionNet(body('test_vit'), 4))

def batches_for(net, n=3):
    size = 160 if net.body.arch=='test_vit' else 32
    x = torch.randn(n, 8, 3, size, size)
    return [(xb, torch.randn(8, 5)) if net.patient is not None else (xb,) for xb in x]

@pytest.fixture(params=KINDS)
def net(request):
    torch.manual_seed(1)
    return KINDS[request.param]().eval()

def test_a_soup_of_one_network_with_itself(net):
    batch = batches_for(net)[0]
    torch.testing.assert_close(average_weights([net]*3)(*batch), net(*batch))

def test_recalibrating_twice_changes_nothing_more(net):
    batches = batches_for(net)
    state = {k: v.clone() for k,v in net.state_dict().items()}
    torch.manual_seed(0)
    once = recalibrate_norm(net, batches)
    torch.testing.assert_close(net.state_dict(), state) # the one given is as it was
    torch.testing.assert_close(recalibrate_norm(once, batches)(*batches[0]), once(*batches[0]), atol=1e-4, rtol=1e-3)
    assert not once.training and not any(m.momentum is None for m in once.modules() if isinstance(m, nn.BatchNorm2d))

def test_the_rest_of_the_network_from_its_features(net):
    batches = batches_for(net)
    whole = torch.cat([net(*b) for b in batches]).detach().log_softmax(1)
    torch.testing.assert_close(logits_from_inputs(net, classifier_inputs(net, batches)), whole, atol=1e-5, rtol=1e-4)

def test_tau_keeps_the_mean_length(net):
    own,new = (list(last_layers(n).values())[-1].weight.norm(dim=1) for n in (net, tau_normalize(net, .7)))
    torch.testing.assert_close(new, own.mean()**.7*own**.3)

def test_a_retrained_classifier_tells_what_the_features_tell(net):
    n_out = net.config()['n_out']
    batches = batches_for(net, 6)
    labels = np.arange(48)%n_out
    inputs = classifier_inputs(net, batches)
    for name,seen in inputs.items(): # features in which each class has its own direction
        inputs[name] = seen*0 + np.eye(seen.shape[1], dtype='float32')[labels]
    before = [layer.weight.clone() for layer in last_layers(net).values()]
    fitted = retrain_classifier(net, inputs, labels, C=10.)
    assert (logits_from_inputs(fitted, inputs).argmax(1).numpy()==labels).all()
    for layer,weight in zip(last_layers(net).values(), before): torch.testing.assert_close(layer.weight, weight)
    assert fitted(*batches[0]).shape==(8, n_out)

def test_hooks_go_also_after_an_error(net):
    with pytest.raises(Exception): classifier_inputs(net, [(torch.randn(2, 4, 8, 8),)])
    assert not any(layer._forward_pre_hooks for layer in last_layers(net).values()) and not net.training

def test_what_has_no_soup():
    ensemble = EnsembleNet([KINDS['one'](), KINDS['one']()])
    with pytest.raises(ValueError, match='EnsembleNet'): average_weights([ensemble, ensemble])
    with pytest.raises(ValueError, match='one by one'): last_layers(ensemble)
    with pytest.raises(ValueError, match='differ in first'):
        average_weights([TwoStageNet(body(), n_out=7, first=f) for f in (0, 5)])

def test_the_images_of_a_predictor(tmp_path):
    from skin_lesions.bundle import save_bundle
    from skin_lesions.core import image_files
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import two_stage_learner
    from skin_lesions.predict import load_predictor
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    from skin_lesions.synthetic import synthetic_ham10000
    data = synthetic_ham10000(tmp_path/'ham', n_images=80, size=(80, 64), show=False)
    meta = split_by_lesion(read_metadata(data))
    dls = ham10000_dataloaders(meta, 32, bs=8, arch='test_efficientnet', num_workers=0, device='cpu')
    save_bundle(two_stage_learner(dls, 'test_efficientnet', pretrained=False), tmp_path/'bundle')
    predictor,files = load_predictor(tmp_path/'bundle', 'cpu'),image_files(data)[:21]
    batches = list(image_batches(predictor, files, bs=10))
    assert [len(xb) for xb, in batches]==[7, 7, 7]
    table = predictor.predict(files, progress=False)
    own = logits_from_inputs(predictor.model, classifier_inputs(predictor.model, batches)).exp().numpy()
    np.testing.assert_allclose(own, table[predictor.codes], atol=1e-5)
    with pytest.raises(ValueError, match='2 or more'): next(image_batches(predictor, files, bs=1))
