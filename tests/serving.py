"What the tests of bundles and predictions share: learners with random weights whose answers differ from image to image."
import numpy as np
import torch

from skin_lesions.data import ham10000_dataloaders
from skin_lesions.learner import lesion_learner, two_stage_learner


def spread(learn):
    "Give the last layers outputs of mean 0 and deviation 1 over some images"
    batches = [learn.dls.train.one_batch()[:-1] for _ in range(4)]
    with torch.no_grad():
        for b in batches: learn.model.train()(*b) # batch statistics
        learn.model.eval()
        for last in (getattr(learn.model, n)[-1] for n in ('head', 'head1', 'head2') if hasattr(learn.model, n)):
            kept = []
            hook = last.register_forward_hook(lambda m, i, o: kept.append(o))
            for b in batches: learn.model(*b)
            hook.remove()
            mean, std = torch.cat(kept).mean(0), torch.cat(kept).std(0)
            last.weight.div_(std[:, None]); last.bias.sub_(mean).div_(std)


def make(meta, kind='two', size=64, crop='random', arch='test_efficientnet', data=None, **kwargs):
    "A learner with random weights whose answers differ from image to image"
    torch.manual_seed(0); np.random.seed(0)
    dls = ham10000_dataloaders(meta, size, crop, 8, arch=arch, num_workers=0, device='cpu', **(data or {}))
    learn = (two_stage_learner if kind == 'two' else lesion_learner)(dls, arch, pretrained=False, **kwargs)
    spread(learn)
    return learn


def each_fifth_valid(meta):
    "Each fifth image of a class for validation"
    return meta.assign(is_valid=meta.groupby('dx').cumcount() % 5 == 0)


def write_engine_files(sample, folder):
    "A calibrated bundle of two stages with patient data and an out-of-distribution score, and its graph"
    from skin_lesions.bundle import save_bundle
    from skin_lesions.decide import fit_calibration
    from skin_lesions.engine import write_engine
    from skin_lesions.ood import fit_ood
    from skin_lesions.predict import load_predictor
    from skin_lesions.predictions import get_predictions
    from skin_lesions.readers import read_metadata
    learn = make(each_fifth_valid(read_metadata(sample)), 'two', data=dict(patient=True))
    calibration = fit_calibration(get_predictions(learn), 'stages_vector', first='nv')
    save_bundle(learn, folder/'b', calibration=calibration, ood=fit_ood(learn))
    write_engine(load_predictor(folder/'b', device='cpu'), folder/'net.onnx')


def mean_bundle(meta, folder):
    "A calibrated bundle of the mean of two networks, one of two stages and one of one, with an out-of-distribution score; its folder"
    from skin_lesions.bundle import bundle_content, save_bundle
    from skin_lesions.decide import fit_calibration
    from skin_lesions.networks import EnsembleNet
    from skin_lesions.ood import fit_ood
    from skin_lesions.predict import Predictor
    from skin_lesions.predictions import get_predictions
    learn, other = make(meta, 'two'), make(meta, 'one')
    record = Predictor(learn.model, *bundle_content(learn), 'cpu').record
    view = {k: record[k] for k in ('side', 'preprocess', 'crop', 'normalization')}
    calibration = fit_calibration(get_predictions(learn), 'vector')
    return save_bundle(EnsembleNet([learn.model, other.model]), folder, classes=record['classes'], view=view, calibration=calibration, ood=fit_ood(learn))


def write_mean_files(sample, folder):
    "`mean_bundle` and its graph"
    from skin_lesions.engine import write_engine
    from skin_lesions.predict import load_predictor
    from skin_lesions.readers import read_metadata
    mean_bundle(each_fifth_valid(read_metadata(sample)), folder/'b')
    write_engine(load_predictor(folder/'b', device='cpu'), folder/'net.onnx')
