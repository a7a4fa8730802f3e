"Patient data end to end: what a network gets, what it must never get, gaps, export, other processes."
import json, re, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from skin_lesions.classes import HAM10000
from skin_lesions.style import percent_text


@pytest.fixture(scope='module')
def meta(sample):
    "With gaps in every patient column, in training and validation rows"
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    m = split_by_lesion(read_metadata(sample))
    m['age'] = m.age.where(m.index % 3 > 0)
    m['sex'] = m.sex.where(m.index % 4 > 0, 'unknown')
    m['site'] = m.site.where(m.index % 5 > 0)
    return m


def loaders(meta, **kw):
    from skin_lesions.data import ham10000_dataloaders
    return ham10000_dataloaders(meta, 64, bs=16, arch='test_efficientnet', num_workers=0, **{'patient': True} | kw)


def learner(kind, dls, **kw):
    from fastai.torch_core import set_seed
    from skin_lesions.learner import lesion_learner, two_stage_learner
    set_seed(5)
    if kind == 'one': return lesion_learner(dls, 'test_efficientnet', pretrained=False, **kw)
    return two_stage_learner(dls, 'test_efficientnet', pretrained=False, shared=kind == 'shared', **kw)


@pytest.mark.parametrize('kind', ['one', 'shared', 'own bodies'])
def test_gaps_train_predict_export_and_load_elsewhere(meta, kind, tmp_path, warm_python):
    from skin_lesions.predictions import get_predictions
    learn = learner(kind, loaders(meta))
    before = [p.detach().clone() for p in learn.model.patient.parameters()]
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-2)
        learn.lr_find(num_it=3, show_plot=False)
    assert np.isfinite(learn.recorder.losses).all()
    assert any(not torch.equal(a, b) for a, b in zip(before, learn.model.patient.parameters()))
    nothing = meta.head(6).assign(age=np.nan, sex=None, site='unknown')
    assert len(get_predictions(learn, nothing)) == 6
    table = get_predictions(learn, meta)
    net, d = learn.model, json.loads(json.dumps(learn.model.config()))
    again = type(net).from_config(d)
    again.load_state_dict(net.state_dict())
    xb = learn.dls.valid.one_batch()[:2]
    torch.testing.assert_close(again.eval()(*xb), net.eval()(*xb))
    if kind != 'shared': return # a fresh interpreter takes seconds
    learn.export(tmp_path/'learner.pkl')
    meta.to_pickle(tmp_path/'meta.pkl')
    done = warm_python('import sys, pandas as pd; from fastai.learner import load_learner; from skin_lesions.predictions import get_predictions\n'
                  'learn = load_learner(sys.argv[1]); print(learn.dls.patient, file=sys.stderr)\n'
                  'get_predictions(learn, pd.read_pickle(sys.argv[2])).to_csv(sys.argv[3])', tmp_path/'learner.pkl', tmp_path/'meta.pkl', tmp_path/'out.csv', cwd=tmp_path)
    assert done.returncode == 0 and 'PatientEncoder(age, sex, site' in done.stderr, done.stderr
    other = pd.read_csv(tmp_path/'out.csv', index_col=0)
    np.testing.assert_allclose(other[list(learn.dls.vocab)], table[list(learn.dls.vocab)], atol=1e-5)


def test_validation_rows_do_not_reach_the_encoder(meta):
    from skin_lesions.patient import PatientEncoder
    changed = meta.assign(age=meta.age.where(~meta.is_valid, 99.), sex=meta.sex.where(~meta.is_valid, 'other'), site=meta.site.where(~meta.is_valid, 'moon'))
    assert PatientEncoder.fit(changed).as_dict() == PatientEncoder.fit(meta).as_dict() == loaders(meta).patient.as_dict()
    encoded = PatientEncoder.fit(meta).encode(changed[changed.is_valid])
    names = PatientEncoder.fit(meta).names
    assert (encoded[:, names.index('site unknown')] == 1).all() and (encoded[:, names.index('sex unknown')] == 1).all()


@pytest.mark.parametrize('column', ['dx', 'dx_type', 'source', 'dataset', 'lesion_id', 'group', 'image_id'])
def test_columns_that_give_the_label_away_are_refused(meta, column):
    frame = meta if column == 'dx' else meta.assign(**{column: 'x'})
    with pytest.raises(ValueError, match=f"column '{column}' cannot be an input: .*Possible: age, sex, site"): loaders(frame, patient=['age', column])


def test_off_by_default(meta):
    from skin_lesions.networks import n_patient
    dls = loaders(meta, patient=False)
    assert len(dls.one_batch()) == 2 and getattr(dls, 'patient', None) is None
    learn = learner('one', dls)
    assert n_patient(learn.model) == 0 and not any('patient' in n for n, _ in learn.model.named_parameters())


def test_mixup_mixes_patients_with_the_images(meta):
    from fastai.callback.core import Callback
    learn = learner('one', loaders(meta), mixup=.7)
    seen = []
    class Look(Callback):
        order = -10
        def before_batch(self): seen.append((self.xb[0].clone(), self.xb[1].clone()))
    class After(Look):
        order = 60
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[Look(), After()])
    (x0, p0), (x1, p1) = seen[:2]
    # each mixed row is .7 of its own and .3 of the same partner in both inputs
    partner = [int((x0-(x1[i]-.7*x0[i])/.3).abs().flatten(1).mean(1).argmin()) for i in range(len(x0))]
    torch.testing.assert_close(p1, .7*p0 + .3*p0[partner], atol=1e-4, rtol=1e-4)
    assert not torch.equal(p0, p1)


def test_items_without_the_columns_get_an_error_that_says_what_to_do(meta, sample):
    from skin_lesions.core import image_files
    from skin_lesions.predictions import get_predictions
    learn = learner('one', loaders(meta))
    with pytest.raises(ValueError, match="no 'age' and no 'sex'.*NaN or 'unknown'"): get_predictions(learn, image_files(sample/'HAM10000_images_part_1')[:3])


def test_data_loading_workers_give_the_same_batches(meta):
    dls, rows = loaders(meta, augment=False), meta.iloc[:12]
    batches = [dls.test_dl(rows, num_workers=workers, bs=12).one_batch() for workers in (0, 2)]
    for a, b in zip(*batches): assert torch.equal(a, b)


@pytest.mark.parametrize('kind', ['one', 'own bodies'])
def test_gradcam_takes_the_patient_along(meta, kind):
    from skin_lesions.gradcam import GradCAM, stream_cams
    from skin_lesions.cam_checks import deletion_insertion
    dls = loaders(meta)
    learn = learner(kind, dls)
    x, patient, _ = (t.as_subclass(torch.Tensor) for t in dls.valid.one_batch())
    explain = GradCAM(learn)
    cams = explain.cam(x, patient=patient)
    learn.model.eval()
    with torch.no_grad(): torch.testing.assert_close(explain.output, learn.model(x, patient).float(), atol=1e-4, rtol=1e-4)
    assert cams.shape == (len(x), 64, 64)
    first = next(iter(stream_cams(learn, meta[meta.is_valid].head(len(x)))))
    torch.testing.assert_close(torch.as_tensor(first.probabilities), explain.output.softmax(1), atol=1e-4, rtol=1e-4)
    assert np.isfinite(deletion_insertion(learn, x, cams, steps=2, patient=patient).to_numpy()).all()


def test_joint_networks_take_the_patient_along(meta):
    from skin_lesions.pretext import joint_restoration_learner, joint_rotation_learner
    dls = loaders(meta, augment=False)
    for learn in (joint_rotation_learner(dls, 'test_efficientnet', pretrained=False), joint_restoration_learner(dls, 'test_efficientnet', 'test_efficientnet', pretrained=False)):
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
        x, patient, _ = (t.as_subclass(torch.Tensor) for t in dls.valid.one_batch())
        learn.model.eval()
        with torch.no_grad(): assert (learn.model(x, patient)-learn.model(x, 1-patient)).abs().max() > 1e-6


NAMES = [HAM10000.full_name(c) for c in HAM10000]


def test_maps_of_the_command_line_take_the_patients_along(meta, tmp_path, capsys):
    from skin_lesions.cli import main
    from skin_lesions.gradcam import stream_cams
    from skin_lesions.bundle import save_bundle
    learn = learner('one', loaders(meta))
    with torch.no_grad(): learn.model.patient[0].weight.mul_(30) # so that patients count
    bundle, rows = save_bundle(learn, tmp_path/'bundle'), meta.head(3)
    rows.assign(age=90).to_csv(tmp_path/'patients.csv', index=False)
    (tmp_path/'in').mkdir()
    for p in rows.path: (tmp_path/'in'/f'{Path(p).stem}.jpg').write_bytes(Path(p).read_bytes())
    predicted = {}
    for name, more in (('with', ('--patients', tmp_path/'patients.csv')), ('without', ())):
        for command in (('predict', '--gradcam'), ('gradcam', '--out')):
            out = tmp_path/f'{name}-{command[0]}'
            with warnings.catch_warnings():
                warnings.simplefilter('ignore') # without patients they count as unknown, and predict says so
                assert main([str(a) for a in (command[0], tmp_path/'in', '--bundle', bundle, command[1], out, *more, '--quiet')]) == 0, capsys.readouterr().err
            predicted[name, command[0]] = re.findall(r'predicted [^(]+ \([\w ]+ %\); map: [^<;]+', (out/'gallery.html').read_text().replace('\N{NO-BREAK SPACE}', ' '))
            maps = [(out/f'{i}_gradcam.png').read_bytes() for i in sorted(rows.image_id)]
            assert predicted.setdefault((name, 'maps'), maps) == maps
    assert predicted['with', 'predict'] == predicted['with', 'gradcam'] != predicted['without', 'predict'] == predicted['without', 'gradcam']
    batch, = stream_cams(learn, rows.assign(age=90).sort_values('image_id'))
    assert predicted['with', 'predict'] == [f"predicted {NAMES[i]} ({percent_text(p[i])}); map: {NAMES[i]}" for i, p in zip(batch.target, batch.probabilities)]
