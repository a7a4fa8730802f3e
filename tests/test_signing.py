"Signatures: every change of what is read is found, nothing else is; keys are handled with care; the commands."
import json, os, shutil, stat, subprocess, sys

import pytest

pytest.importorskip('model_signing', reason='needs model-signing and pyopenssl')
pytest.importorskip('OpenSSL', reason='needs model-signing and pyopenssl')

from skin_lesions.bundle import image_view, save_bundle
from skin_lesions.classes import HAM10000
from skin_lesions.cli import main
from skin_lesions.networks import LesionNet, create_body
from skin_lesions.signing import SIGNATURE, make_keys, sign_bundle, verify_bundle


@pytest.fixture(scope='module')
def signed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('signed')
    private, public = make_keys(folder/'keys')
    net = LesionNet(create_body('test_efficientnet', pretrained=False), 7)
    bundle = save_bundle(net, folder/'bundle', classes=HAM10000, view=image_view(32, arch='test_efficientnet'))
    sign_bundle(bundle, private)
    return bundle, private, public


@pytest.fixture
def copy(signed, tmp_path): return shutil.copytree(signed[0], tmp_path/'bundle'), signed[1], signed[2]


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


CHANGES = dict(
    first_byte_of_tensors=lambda b: flip(b/'model.safetensors', 0), last_byte_of_tensors=lambda b: flip(b/'model.safetensors', -1),
    a_byte_of_the_record=lambda b: flip(b/'bundle.json', 100),
    a_record_without_its_notice=lambda b: (b/'bundle.json').write_text(json.dumps(json.loads((b/'bundle.json').read_text()) | dict(notice=''))),
    longer=lambda b: (b/'bundle.json').write_text((b/'bundle.json').read_text() + ' '),
    another_signature=lambda b: flip(b/SIGNATURE, 60), no_json=lambda b: (b/SIGNATURE).write_text('no JSON'),
    empty_signature=lambda b: (b/SIGNATURE).write_text('{}'))


@pytest.mark.parametrize('change', CHANGES)
def test_a_change_is_found(change, copy):
    bundle, _, public = copy
    assert verify_bundle(bundle, public) == bundle
    CHANGES[change](bundle)
    with pytest.raises(ValueError, match='does not fit this bundle and this key'): verify_bundle(bundle, public)


def test_folders_may_be_named_from_where_one_stands(copy, monkeypatch, capsys):
    bundle, private, public = copy
    monkeypatch.chdir(bundle.parent)
    (bundle/SIGNATURE).unlink()
    (bundle/'report.html').write_text('not signed')
    assert main(['sign', 'bundle', '--key', os.path.relpath(private)]) == 0 and main(['verify', 'bundle', '--key', os.path.relpath(public)]) == 0
    assert 'bundle: signed by the owner of' in capsys.readouterr().out
    flip(bundle/'bundle.json', 100)
    assert main(['verify', 'bundle', '--key', os.path.relpath(public)]) != 0


def test_what_is_not_read_may_change(copy):
    bundle, _, public = copy
    for name in ('README.md', 'report.html', 'scores.json'): (bundle/name).write_text('new')
    (bundle/'maps').mkdir()
    (bundle/'maps'/'a.png').write_bytes(b'png')
    verify_bundle(bundle, public)


def test_a_signature_belongs_to_its_bundle(copy, tmp_path):
    bundle, private, public = copy
    net = LesionNet(create_body('test_efficientnet', pretrained=False), 7)
    other = save_bundle(net, tmp_path/'other', classes=HAM10000, view=image_view(32, arch='test_efficientnet'))
    shutil.copy(bundle/SIGNATURE, other)
    with pytest.raises(ValueError, match='does not fit'): verify_bundle(other, public)


def test_the_private_key_is_the_owners(signed, tmp_path):
    if os.name == 'posix': assert stat.S_IMODE(signed[1].stat().st_mode) == 0o600
    assert b'PRIVATE' in signed[1].read_bytes() and b'PRIVATE' not in signed[2].read_bytes()
    with pytest.raises(FileExistsError, match='lost key signs nothing'): make_keys(signed[1].parent)
    before = signed[2].read_bytes()
    assert signed[2].read_bytes() == before


def test_a_password(copy, tmp_path):
    bundle = copy[0]
    private, public = make_keys(tmp_path/'locked', password='correct horse')
    assert b'ENCRYPTED' in private.read_bytes()
    with pytest.raises(ValueError, match='with this password'): sign_bundle(bundle, private)
    with pytest.raises(ValueError, match='with this password'): sign_bundle(bundle, private, 'battery staple')
    sign_bundle(bundle, private, 'correct horse')
    verify_bundle(bundle, public)


def test_a_broken_bundle_is_not_signed(copy):
    bundle, private, _ = copy
    flip(bundle/'model.safetensors', -1)
    with pytest.raises(ValueError, match='checksum'): sign_bundle(bundle, private)


def test_the_specifications_own_program_agrees(copy):
    "The package's command line, which knows nothing of this library, verifies the same signature"
    bundle, _, public = copy
    cmd = [sys.executable, '-m', 'model_signing', 'verify', 'key', str(bundle), '--signature', str(bundle/SIGNATURE), '--public_key', str(public)]
    done = subprocess.run(cmd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    flip(bundle/'model.safetensors', -1)
    assert subprocess.run(cmd, capture_output=True, text=True).returncode != 0


def test_the_commands(copy, tmp_path, capsys):
    bundle, *_ = copy
    assert main(['sign', str(bundle), '--key', str(tmp_path/'mine'), '--make-keys']) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(bundle/SIGNATURE) and 'public.pem' in err
    assert main(['verify', str(bundle), '--key', str(tmp_path/'mine'/'public.pem')]) == 0
    assert 'not changed since' in capsys.readouterr().out
    flip(bundle/'bundle.json', 50)
    assert main(['verify', str(bundle), '--key', str(tmp_path/'mine'/'public.pem')]) == 2
    assert 'does not fit' in capsys.readouterr().err
